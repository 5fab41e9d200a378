"""Foreign text as a part of ours: whatever a terminal or a log would act on is escaped."""

from __future__ import annotations

import re

MAX_ERROR_CHARS = 300
# What JSON leaves as it is: controls, what ends or reorders a line, halves of surrogate pairs.
_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text on one line, with whatever does not print written as \n, \x1b, ..."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """A text as part of a line of prose: its line ends become spaces."""
    return printable(" ".join(text.split()))


def error_line(error: BaseException) -> str:
    """What an error of somebody else's code says, cut; its class if it says nothing."""
    said = one_line(str(error)[:MAX_ERROR_CHARS])  # escapes make it longer
    return said[:MAX_ERROR_CHARS] or type(error).__name__


def printable_json(text: str) -> str:
    r"""JSON with whatever does not print written as \u009b, ..."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
