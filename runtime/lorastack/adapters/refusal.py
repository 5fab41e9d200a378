"""How an adapter folder is refused: one line each for malformed and for unsupported.

Messages quote what uploads say, so whatever a terminal or a log would not print is escaped here.
"""

from __future__ import annotations

from lorastack.errors import InvalidArgumentError, Reason


def invalid(message: str) -> InvalidArgumentError:
    """The folder is malformed or does not fit the base model."""
    return InvalidArgumentError(printable(message), reason=Reason.INVALID_ADAPTER)


def unsupported(message: str) -> InvalidArgumentError:
    """The folder is well-formed, but asks for maths that is not implemented here."""
    return InvalidArgumentError(printable(message), reason=Reason.UNSUPPORTED_ADAPTER)


def printable(text: str) -> str:
    """The text with control characters, line ends and lone surrogates escaped as Python does."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
