"""Between text and token ids: tokenizer, chat templates, incremental text, stop sequences."""
