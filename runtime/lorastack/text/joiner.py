"""How tokens join into text, one at a time.

A tokenizer.json describes it as a chain of decoders over the whole list of tokens. Two families are
known here, those of Llama and Mistral models; each has a joiner whose joined pieces are what the
chain gives for the whole list.

A joiner may stand behind a prompt: then its pieces are the text of prompt and output together,
less the prompt's text at its beginning. One case needs a rule: a prompt that ends inside a
character shows U+FFFD there. If the output completes the character, it belongs to the output; no
other character of the prompt ever does.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from lorastack.errors import InvalidArgumentError, Reason

UNKNOWN_CHARACTER = "\ufffd"
_HEX = "0123456789abcdefABCDEF"
_BYTE_TOKENS = {f"<0x{high}{low}>": int(high + low, 16) for high in _HEX for low in _HEX}
_CONTINUATIONS = bytes(range(0x80, 0xC0))  # bytes inside a character
MAX_RUN = 4096  # bytes: a longer run at a prompt's end is read in part


class Joiner(Protocol):
    """The text of one growing list of tokens. Work a token does not grow with the list."""

    @property
    def num_dropped(self) -> int:
        """Spaces that are left out at the text's beginning; 0 behind a prompt with text."""
        ...

    @property
    def has_broken_bytes(self) -> bool:
        """True if the prompt's last tokens are bytes that are not whole characters: byte tokens
        that follow may show as U+FFFD, one each."""
        ...

    def follow(self, before: Iterable[str]) -> None:
        """Stands behind a prompt of these tokens, last one first; reads no more than needed.

        Called once, before all else.
        """
        ...

    def push(self, token: str) -> str:
        """What has become certain with this token: whole characters only."""
        ...

    def flush(self) -> str:
        """What was held back, unfinished characters as U+FFFD. Nothing is pushed afterwards."""
        ...

    def alone(self, token: str) -> str:
        """The text of one token by itself, for display."""
        ...

    def raw(self, token: str) -> bytes:
        """The UTF-8 bytes that a token adds to a text, perhaps part of a character."""
        ...


def joiner_factory(decoder: Mapping[str, Any] | None) -> Callable[[], Joiner]:
    """Makes joiners for the `decoder` of a tokenizer.json.

    Raises InvalidArgumentError naming a decoder that is not known.
    """
    if decoder is None:
        raise _unsupported("none")
    links = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [link["type"] for link in links]
    if kinds == ["ByteLevel"]:
        return ByteLevelJoiner
    if kinds == ["Metaspace"]:
        replacements = ((str(links[0]["replacement"]), " "),)
        drops_first = links[0].get("prepend_scheme", "always") != "never"
        return lambda: SpacesJoiner(replacements, drops_first=drops_first)
    return _spaces_factory(links, kinds)


def _spaces_factory(
    links: Sequence[Mapping[str, Any]], kinds: Sequence[str]
) -> Callable[[], Joiner]:
    """Replace..., ByteFallback, Fuse, Strip; all but Fuse before a Strip may be missing."""
    if not re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse (Strip )?)?", " ".join((*kinds, ""))):
        raise _unsupported(" ".join(kinds))
    replacements = []
    strip = 0
    for link in links:
        if link["type"] == "Replace":
            if "String" not in link["pattern"]:
                raise _unsupported("Replace with a regular expression")
            replacements.append((str(link["pattern"]["String"]), str(link["content"])))
        elif link["type"] == "Strip":
            if link["content"] != " " or link["stop"]:
                raise _unsupported("Strip of anything but leading spaces")
            strip = int(link["start"])
    settled, has_bytes = tuple(replacements), "ByteFallback" in kinds
    return lambda: SpacesJoiner(settled, strip=strip, has_bytes=has_bytes)


def _unsupported(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"The tokenizer's decoder ({name}) is not supported: use a model whose tokenizer.json "
        "decodes with ByteLevel, Metaspace or Replace, ByteFallback, Fuse, Strip.",
        reason=Reason.UNSUPPORTED_MODEL,
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()


class ByteLevelJoiner:
    """GPT-2, Llama 3, SmolLM2, Tekken: every character of a token stands for a byte."""

    num_dropped = 0
    has_broken_bytes = False  # characters that begin after broken bytes stay whole

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._marked = False  # the prompt shows U+FFFD for the bytes that are held

    def follow(self, before: Iterable[str]) -> None:
        held = b""
        for token in before:
            held = _token_bytes(token) + held
            if len(held) >= 3:  # an unfinished character has at most three
                break
        self._utf8.decode(held[-3:])
        self._marked = self._utf8.getstate()[0] != b""

    def push(self, token: str) -> str:
        return self._unmarked(self._utf8.decode(_token_bytes(token)))

    def flush(self) -> str:
        return self._unmarked(self._utf8.decode(b"", final=True))

    def _unmarked(self, text: str) -> str:
        if self._marked and text:
            self._marked = False
            return text.removeprefix(UNKNOWN_CHARACTER)
        return text

    def alone(self, token: str) -> str:
        return _token_bytes(token).decode("utf-8", "replace")

    def raw(self, token: str) -> bytes:
        return _token_bytes(token)


def _token_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:  # an added token, written as it is
        return token.encode()


class SpacesJoiner:
    """SentencePiece (Llama 2, Mistral): "▁" stands for a space, rare characters for their bytes.

    A run of byte tokens is held until it ends: it is text if all of it is UTF-8, else each byte
    shows as U+FFFD. The first token loses its space, by `strip` (that many leading spaces of the
    text) or by `drops_first` (every replaced mark of the first token).
    """

    def __init__(
        self,
        replacements: Sequence[tuple[str, str]],
        *,
        strip: int = 0,
        drops_first: bool = False,
        has_bytes: bool = False,
    ) -> None:
        self._replacements = replacements
        self._strip = strip
        self._drops = drops_first
        self._has_bytes = has_bytes
        self._run = bytearray()
        self._num_given = 0  # bytes of the run that are the prompt's
        self._given = ""  # what the prompt shows for them

    @property
    def num_dropped(self) -> int:
        return int(self._drops) or _left(self._strip, _run_text(self._run))

    @property
    def has_broken_bytes(self) -> bool:
        return UNKNOWN_CHARACTER in _run_text(self._run)

    def follow(self, before: Iterable[str]) -> None:
        tokens = iter(before)
        run = bytearray()
        for token in tokens:
            byte = self._byte(token)
            if byte is None:
                self._drops = False
                self._take_spaces(map(self.alone, chain((token,), tokens)))
                break
            run.append(byte)
            if len(run) == MAX_RUN:  # takes what stands before for whole characters
                self._strip = 0
                break
        run.reverse()
        self._run = run.lstrip(_CONTINUATIONS) if len(run) == MAX_RUN else run
        self._num_given = len(self._run)
        self._given = _stripped(_run_text(self._run), self._strip)

    def push(self, token: str) -> str:
        byte = self._byte(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        text = self._end_run() + self._taken(self._replaced(token, drop=self._drops))
        self._drops = False
        return text

    def flush(self) -> str:
        return self._end_run()

    def alone(self, token: str) -> str:
        byte = self._byte(token)
        if byte is None:
            return self._replaced(token, drop=False)
        return chr(byte) if byte < 0x80 else UNKNOWN_CHARACTER

    def raw(self, token: str) -> bytes:
        byte = self._byte(token)
        return self._replaced(token, drop=False).encode() if byte is None else bytes([byte])

    def _byte(self, token: str) -> int | None:
        return _BYTE_TOKENS.get(token) if self._has_bytes else None

    def _end_run(self) -> str:
        """The text of the run, without what the prompt shows of it."""
        run, given, num_given = self._run, self._given, self._num_given
        if not run:
            return ""
        self._run, self._given, self._num_given = bytearray(), "", 0
        whole = _run_text(run)
        text = self._taken(whole)
        if text.startswith(given):
            return text[len(given) :]
        # The output's bytes break a run that was text, or complete one that was not.
        if whole == UNKNOWN_CHARACTER * len(run):
            return whole[num_given:]
        return whole[len(run[:num_given].decode(errors="ignore")) :]

    def _replaced(self, token: str, *, drop: bool) -> str:
        for mark, content in self._replacements:
            token = token.replace(mark, "" if drop else content)
        return token

    def _taken(self, text: str) -> str:
        """The text's next part, without spaces at its beginning that are still to be left out."""
        if not self._strip:
            return text
        taken = _stripped(text, self._strip)
        self._take_spaces((text,))
        return taken

    def _take_spaces(self, texts: Iterable[str]) -> None:
        """Counts parts of the text, in any order, against the spaces that are left out."""
        for text in texts if self._strip else ():
            self._strip = _left(self._strip, text)
            if not self._strip:
                return


def _run_text(run: bytearray) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return UNKNOWN_CHARACTER * len(run)


def _left(limit: int, text: str) -> int:
    """How many spaces are still to be left out behind this text."""
    return 0 if text.strip(" ") else max(0, limit - len(text))


def _stripped(text: str, limit: int) -> str:
    """The text without its first `limit` spaces, or as many as it has."""
    return text[min(limit, len(text) - len(text.lstrip(" "))) :]
