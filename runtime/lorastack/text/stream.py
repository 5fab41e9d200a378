"""Text as it grows: tokens to text, and the stop sequences in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorastack.text.tokenizer import Tokenizer


class Detokenizer:
    """Incremental `Tokenizer.decode`: joined pushes and flush are the text of all ids.

    Behind a prompt they are the text of prompt and output, less the prompt's (see `text.joiner`).
    Special tokens give no text. A push costs the same however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._joiner = tokenizer.joiner(prompt_ids)

    def push(self, token_ids: Iterable[int]) -> str:
        """New text: whole characters only."""
        tokens = (self._tokenizer.token(token_id) for token_id in token_ids)
        return "".join(self._joiner.push(token) for token in tokens if token is not None)

    def flush(self) -> str:
        """The rest, an unfinished character as U+FFFD. Nothing may be pushed afterwards."""
        return self._joiner.flush()


class StopMatcher:
    """Finds the stop sequence that is complete first; the longest, if several end together.

    The rule reads the text one character at a time, so it never waits for a longer sequence once a
    shorter one is there, and its result does not depend on how the text is cut into pushes.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        assert all(sequences), "a stop sequence is empty"
        self._sequences = tuple(sequences)
        self._fallbacks = tuple(_fallbacks(sequence) for sequence in self._sequences)
        self._matched = [0] * len(self._sequences)  # characters of each that the text ends with
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(settled text, the sequence that ended it or None).

        Settled text cannot be part of a stop sequence. After a match nothing may follow: the text
        given is what stood before the match.
        """
        text, start = self._held + text, len(self._held)
        for position in range(start, len(text)):
            match = self._advance(text[position])
            if match is not None:
                return text[: position + 1 - len(match)], match
        settled = len(text) - max(self._matched, default=0)
        self._held = text[settled:]
        return text[:settled], None

    def flush(self) -> str:
        """Text held back for a sequence that did not come."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Knuth, Morris and Pratt's step for every sequence; the longest that is complete."""
        complete = ""
        for index, sequence in enumerate(self._sequences):
            matched = self._matched[index]
            while matched and sequence[matched] != char:
                matched = self._fallbacks[index][matched]
            if sequence[matched] == char:
                matched += 1
            self._matched[index] = matched
            if matched == len(sequence) > len(complete):
                complete = sequence
        return complete or None


def _fallbacks(sequence: str) -> tuple[int, ...]:
    """Per matched length: the longest shorter prefix that the matched part also ends with."""
    fallbacks = [0, 0]
    matched = 0
    for char in sequence[1:]:
        while matched and sequence[matched] != char:
            matched = fallbacks[matched]
        if sequence[matched] == char:
            matched += 1
        fallbacks.append(matched)
    return tuple(fallbacks)


class TextStream:
    """A row's text: its tokens' text up to its first stop sequence.

    match: the stop sequence that ended the text, None while it goes on.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_sequences: Sequence[str], prompt_ids: Sequence[int] = ()
    ) -> None:
        """Stop sequences are looked for in the output alone."""
        self.match: str | None = None
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._matcher = StopMatcher(stop_sequences)

    def push(self, token_id: int) -> str:
        """New settled text. After a match nothing may be pushed."""
        text, self.match = self._matcher.push(self._detokenizer.push((token_id,)))
        return text

    def flush(self) -> str:
        """All that was held back; it may still complete a match. Call once, without a match."""
        text, self.match = self._matcher.push(self._detokenizer.flush())
        return text if self.match is not None else text + self._matcher.flush()
