"""What serving taught about heads, kept beside them. If it is lost, it is learnt again.

One JSON object: digest -> the learner's own text, the last changed one last. The digest is "" for
what belongs to no heads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from lorastack.adapters.formats.jsonfile import read_object
from lorastack.adapters.formats.refusal import invalid
from lorastack.adapters.store.durable import replace_file
from lorastack.config import MIB
from lorastack.errors import InvalidArgumentError

MAX_BYTES = MIB  # for all texts: those that did not change for longest are dropped beyond it

logger = logging.getLogger(__name__)


class Learned:
    """The store's texts. One thread at a time."""

    def __init__(self, root: Path, knows: Callable[[str], bool]) -> None:
        """Reads them; a damaged file counts as empty. knows: True for a digest in the store."""
        self._path = root / "acceptance.json"
        self._knows = knows
        self._saved = _read(self._path)
        self.texts: Mapping[str, str] = self._kept(self._saved)

    def save(self, newer: Mapping[str, str]) -> None:
        """Takes in newer texts, drops those of deleted adapters, and writes if anything changed.

        Raises OSError; the next call tries again. Only for the process that writes the store.
        """
        older = {digest: text for digest, text in self.texts.items() if digest not in newer}
        self.texts = kept = self._kept(older | dict(newer))
        if kept != self._saved:
            replace_file(self._path, json.dumps(kept).encode())
            self._saved = kept

    def _kept(self, texts: Mapping[str, str]) -> dict[str, str]:
        left, kept = MAX_BYTES, []
        for digest, text in reversed(list(texts.items())):
            if digest and not self._knows(digest):
                continue
            left -= len(digest) + len(text)
            if left < 0:
                break
            kept.append((digest, text))
        return dict(reversed(kept))


def _read(path: Path) -> dict[str, str]:
    try:
        fields = read_object(path, path.name, 4 * MAX_BYTES)  # quotes in a text take two bytes
        texts = {digest: text for digest, text in fields.items() if isinstance(text, str)}
        if len(texts) < len(fields):
            raise invalid(f"{path.name} holds more than texts")
    except FileNotFoundError:
        return {}
    except (OSError, InvalidArgumentError) as error:
        logger.warning("what was learnt about heads starts anew: %s", error)
        return {}
    return texts
