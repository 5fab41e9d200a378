"""Adapter ids: `[namespace/]name`, and `id@sha256:...` for one revision."""

from __future__ import annotations

import re

from lorastack.errors import InvalidArgumentError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_ID = re.compile(rf"({_NAME}/)?{_NAME}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
NO_HEADS = "none"  # in place of an id of heads: no heads
MERGED = "merged/"  # how ids of adapters begin that the server merged of others
# Words with a meaning of their own in place of an id.
RESERVED_IDS = frozenset({NO_HEADS, "base", "default"})


def check_id(adapter_id: str) -> None:
    """Raises InvalidArgumentError unless an adapter can be stored under this id."""
    if adapter_id in RESERVED_IDS:
        raise InvalidArgumentError(f"the id {adapter_id!r} is reserved: choose another one")
    if not _ID.fullmatch(adapter_id):
        raise InvalidArgumentError(
            f"{adapter_id[:200]!r} is not an adapter id: use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, at most 96 characters, with an optional 'namespace/'"
        )


def check_new_id(adapter_id: str) -> None:
    """As `check_id`, of what a caller stores: ids of merged adapters are the server's to give."""
    check_id(adapter_id)
    if adapter_id.startswith(MERGED):
        raise InvalidArgumentError(
            f"ids that begin with {MERGED!r} are those of merged adapters: choose another one"
        )


def is_digest(text: str) -> bool:
    """True for "sha256:" and 64 lower-case hex digits."""
    return _DIGEST.fullmatch(text) is not None


def split_reference(reference: str) -> tuple[str, str | None]:
    """(id, digest) of `id@sha256:...`; (id, None) of a plain id."""
    adapter_id, separator, digest = reference.partition("@")
    return adapter_id, digest if separator else None


def flat_name(adapter_id: str) -> str:
    """The id as a name of one file or folder; '%' is in no id, so no two ids collide."""
    return adapter_id.replace("/", "%2F")


def file_name(adapter_id: str) -> str:
    """Of the file in the store's `ids` that points at the id's newest revision."""
    return flat_name(adapter_id) + ".json"
