"""Worker processes for programs that callers write: chat templates and grammars."""
