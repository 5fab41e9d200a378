"""Between text and token ids: tokenizer, incremental text, stop sequences, grammars."""
