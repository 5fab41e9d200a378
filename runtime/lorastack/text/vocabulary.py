"""The model's tokens as llguidance wants them: bytes, and a way to cut text into tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from lorastack.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Every tokenizer cuts this from what follows: no word and no merge has it.
_MARK = "\x02"


class Vocabulary:
    """Immutable once built, which takes some tenths of a second.

    tokens: per output of the model, the bytes that its token adds to a text; empty for those that
    are never part of one: special and end tokens, and outputs without a token.
    """

    # llguidance.TokenizerWrapper reads these beside `tokens`. Special tokens have no bytes here, so
    # none need to be told apart.
    bos_token_id = None
    special_token_ids = ()

    def __init__(
        self,
        tokens: Sequence[bytes],
        end_ids: Collection[int],
        encode: Callable[[str], list[int]],
        num_dropped: int,
    ) -> None:
        """end_ids: at least one. encode: as `Tokenizer.encode_part`. num_dropped: spaces that a
        text loses at its beginning, at most."""
        # Deferred: only servers that are asked for structured output load it.
        from llguidance import LLTokenizer, TokenizerWrapper

        self.tokens = tokens
        self.num_dropped = num_dropped
        self.eos_token_id = min(end_ids)
        self._encode = encode
        self.llguidance: LLTokenizer = LLTokenizer(
            TokenizerWrapper(self), eos_token=sorted(end_ids)
        )

    def __call__(self, data: bytes) -> list[int]:
        """Ids of UTF-8 text inside another, as the model mostly sees it; [] if no ids spell it.

        Text that names a special token or an added one is cut into characters instead.
        """
        text = data.decode()
        encode = self._encode
        ids = encode(text)
        if self._spells(ids, data):
            return ids
        # SentencePiece puts a space before a text.
        mark = encode(_MARK)
        ids = encode(_MARK + text)[len(mark) :]
        if self._spells(ids, data):
            return ids
        ids = [index for char in text for index in encode(_MARK + char)[len(mark) :]]
        return ids if self._spells(ids, data) else []

    def _spells(self, ids: list[int], data: bytes) -> bool:
        known = all(index < len(self.tokens) for index in ids)
        return known and b"".join(self.tokens[index] for index in ids) == data


def token_bytes(tokenizer: Tokenizer, end_ids: Collection[int], vocab_size: int) -> list[bytes]:
    """`Vocabulary.tokens` of a model with `vocab_size` outputs."""
    joiner = tokenizer.joiner()
    entries = [None if i in end_ids else tokenizer.token(i) for i in range(vocab_size)]
    return [b"" if entry is None else joiner.raw(entry) for entry in entries]
