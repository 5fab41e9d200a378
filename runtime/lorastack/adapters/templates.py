"""The chat templates that LoRAs bring; those that chats used last are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict

from lorastack.adapters.formats.parse import chat_template
from lorastack.adapters.store.registry import Registry

MAX_KEPT = 256  # templates
MAX_KEPT_CHARS = 4 << 20  # in all of them


class OwnTemplates:
    """Digest -> template, read from the store once and kept while in use. For any thread."""

    def __init__(self, registry: Registry, models_own: str | None) -> None:
        """models_own: the base model's template; an adapter's that equals it counts as none."""
        self._registry = registry
        self._models_own = models_own
        self._keeping = threading.Lock()
        self._kept: OrderedDict[str, str | None] = OrderedDict()

    def of(self, digest: str) -> str | None:
        """A LoRA's own template; None if the model's serves.

        Raises NotFoundError, or what a malformed file raises.
        """
        with self._keeping:
            if digest in self._kept:
                self._kept.move_to_end(digest)
                return self._kept[digest]
        template = chat_template(self._registry.files(digest))
        if template == self._models_own:
            template = None
        with self._keeping:
            self._kept[digest] = template
            num_chars = sum(len(each or "") for each in self._kept.values())
            while len(self._kept) > MAX_KEPT or num_chars > MAX_KEPT_CHARS:
                _, oldest = self._kept.popitem(last=False)
                num_chars -= len(oldest or "")
        return template
