"""Text of callers as it may stand in a status, a log line or a terminal."""

from __future__ import annotations

import re

# Control characters (new lines and terminal escapes among them), what reorders a line, and halves
# of surrogate pairs, which no encoding takes.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text on one line, with whatever could not be shown as it is written as \n, \x1b, ..."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_json(text: str) -> str:
    r"""The same for a line of JSON, which stays one: \u001b, ..."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
