"""A model folder's JSON files: reading them, and checks of values that name file and field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.printable import error_line

MAX_SHOWN = 60  # characters of a value in a message
MAX_INT = 2**31 - 1  # for counts, sizes and token ids


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if there is no such file.

    Raises InvalidArgumentError for a file that cannot be read or holds no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(path), error) from error
    return parse_object(text, str(path))


def parse_object(text: str, name: str) -> dict[str, Any]:
    """A text's JSON object; `name` is what errors call the text.

    Raises InvalidArgumentError for anything else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(name, error) from error
    if not isinstance(value, dict):
        raise invalid(f"{name} must hold a JSON object, not {shown(value)}")
    return value


def _unreadable(name: str, error: Exception) -> InvalidArgumentError:
    return invalid(f"{name} cannot be read as JSON: {error_line(error)}")


def check(ok: bool, path: Path, field: str, rule: str, value: object) -> None:
    """Raises InvalidArgumentError unless ok: `field` of `path` must be `rule`."""
    if not ok:
        raise invalid(f"{path}: {field} must be {rule}, not {shown(value)}")


def token_ids(path: Path, config: Mapping[str, Any], field: str) -> list[int]:
    """The ids of a field that holds an id, a list of ids or null. Raises InvalidArgumentError."""
    value = config.get(field)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    rule = "a token id, a list of token ids or null"
    check(all(is_int(index) and 0 <= index <= MAX_INT for index in ids), path, field, rule, value)
    return ids


def is_int(value: object) -> TypeGuard[int]:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """True for a finite float or an int within +-MAX_INT, not for a bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= MAX_INT


def shown(value: object) -> str:
    """A value as messages quote it: JSON, cut at MAX_SHOWN characters."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a deep nest
        return f"such a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def invalid(message: str) -> InvalidArgumentError:
    """The error for a model that is malformed."""
    return InvalidArgumentError(message, reason=Reason.INVALID_MODEL)
