"""What the service knows of the base model that it serves."""

from __future__ import annotations

from dataclasses import dataclass

from lorastack.text.tokenizer import Tokenizer

TEXT_SLACK = 1024  # bytes beyond what fills the context: a tokenizer may drop some


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Facts that stay as they are while the server runs; `service.describe` fills them in."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    vocab_size: int
    max_context: int  # tokens
    device: str
    dtype: str
    quantization: str
    backend: str
    lossless: bool  # a row's tokens depend neither on other rows nor on drafts
    kv_memory: int  # bytes
    threads: int = 0  # CPU threads of a step; 0: unknown

    @property
    def max_text(self) -> int:
        """Bytes of text: more cannot fit the context, however long its tokens are."""
        return self.max_context * self.tokenizer.longest_token + TEXT_SLACK
