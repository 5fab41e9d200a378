"""Worker processes for what callers write that is a program: chat templates and grammars."""
