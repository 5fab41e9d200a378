"""Strict reading of the small JSON and text files of an adapter folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NoReturn

from lorastack.adapters.formats.refusal import invalid

MAX_OBJECTS = 1 << 14
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_text(path: Path, name: str, max_bytes: int) -> str:
    """The file as UTF-8. Raises InvalidArgumentError when it is larger or not UTF-8."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise invalid(f"{name} is larger than {max_bytes} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"{name} is not UTF-8: {error}") from error


def read_object(path: Path, name: str, max_bytes: int) -> dict[str, object]:
    """The file's JSON object. Raises InvalidArgumentError on anything else (see `parse_object`)."""
    return parse_object(read_text(path, name, max_bytes), name)


def parse_object(text: str, name: str) -> dict[str, object]:
    """The text's JSON object; `name` is what errors call the text.

    Raises InvalidArgumentError for what parsers disagree on (duplicate keys, NaN, Infinity), for
    halves of surrogate pairs, and for more objects than any adapter needs.
    """
    value = _parse(text, 0, name, whole=True)
    if not isinstance(value, dict):
        raise invalid(f"{name} must hold a JSON object")
    return value


def parse_first(text: str, key: str, name: str) -> object:
    """The value of the first mention of a key; None without one. Raises as `parse_object`.

    For large files whose writers put the key first: the rest is not parsed.
    """
    mention = re.search(rf'"{re.escape(key)}"\s*:\s*', text)
    return _parse(text, mention.end(), name, whole=False) if mention else None


def _parse(text: str, start: int, name: str, *, whole: bool) -> object:
    num_objects = count()

    def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        if next(num_objects) == MAX_OBJECTS:
            raise invalid(f"{name} holds more than {MAX_OBJECTS} objects")
        table: dict[str, object] = {}
        for key, value in pairs:
            if key in table:
                raise invalid(f"{name} has the key {key[:64]!r} twice")
            table[key] = value
        return table

    def no_constant(constant: str) -> NoReturn:
        raise invalid(f"{name} contains {constant}, which is not JSON")

    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=no_constant)
    try:
        if whole:
            value = decoder.decode(text)
        else:
            value, end = decoder.raw_decode(text, start)
            text = text[start:end]
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(f"{name} holds half a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise invalid(f"{name} is not valid JSON: {error}") from error
    return value
