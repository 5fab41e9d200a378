"""Foreign text inside our own: whatever a terminal or a log would act on is escaped."""

from __future__ import annotations

import re

MAX_ERROR_CHARS = 300
# Characters that JSON leaves as they are: controls, ends and reordering of lines, surrogates.
_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text on one line, with whatever does not print written as \n, \x1b, ..."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def one_line(text: str) -> str:
    """The text inside a line of prose: runs of white space become one space."""
    return printable(" ".join(text.split()))


def error_line(error: BaseException) -> str:
    """The message of an error that a library raised, cut; the error's class if it has none."""
    said = one_line(str(error)[:MAX_ERROR_CHARS])  # escapes make it longer
    return said[:MAX_ERROR_CHARS] or type(error).__name__


def printable_json(text: str) -> str:
    r"""The JSON with whatever does not print written as \u009b, ..."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
