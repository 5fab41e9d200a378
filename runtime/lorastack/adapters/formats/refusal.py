"""The errors that refuse an adapter folder: malformed or unsupported.

Messages quote uploads, so whatever a terminal or a log would act on is escaped here.
"""

from __future__ import annotations

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.printable import printable


def invalid(message: str) -> InvalidArgumentError:
    """The folder is malformed or does not fit the base model."""
    return InvalidArgumentError(printable(message), reason=Reason.INVALID_ADAPTER)


def unsupported(message: str) -> InvalidArgumentError:
    """The folder is well-formed, but asks for maths that is not implemented here."""
    return InvalidArgumentError(printable(message), reason=Reason.UNSUPPORTED_ADAPTER)
