"""From a stored adapter's files to its packed tensors: what the host cache loads with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lorastack.adapters.formats.parse import ParsedAdapter, parse
from lorastack.adapters.memory.fill import fill
from lorastack.adapters.memory.host import HeadRows, PackedAdapter
from lorastack.adapters.store.blobs import damaged_blob
from lorastack.adapters.store.registry import Registry
from lorastack.errors import InvalidArgumentError
from lorastack.layout import (
    DRAFT_KEY,
    AdapterLayout,
    ModelShapes,
    TensorKey,
    TensorSlot,
)

Allocate = Callable[
    [
        Mapping[TensorKey, tuple[int, ...]],
        Mapping[tuple[int, str], float],
        int,
        tuple[int, ...],
    ],
    tuple[AdapterLayout, Tensor],
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Digest -> packed adapter, for the host cache. Blobs are checked against their digests.

    allocate: an adapter's shapes, scales, number of heads and draft vocabulary -> its layout and a
    buffer for it, in the form and dtype that the model's backend reads. head_rows: writes the base
    lm_head's rows of these N tokens to a tensor [N, H]; None: the copy to the device does, and the
    buffer has no room for them.
    """

    registry: Registry
    shapes: ModelShapes
    allocate: Allocate
    head_rows: HeadRows | None

    def __call__(self, digest: str) -> PackedAdapter:
        """Raises NotFoundError, DataLossError, or what `parse` raises (another base model)."""
        manifest = self.registry.manifest(digest)  # once: an upload may replace it meanwhile
        files = {spec.name: self.registry.path(spec) for spec in manifest.files}
        try:
            parsed = parse(files, self.shapes, manifest.module_scales)
            layout, buffer = self._allocate(parsed)
            places = [
                (entry, _place(buffer, layout.slots[key])) for key, entry in parsed.tensors.items()
            ]
            hashes = fill(list(files.values()), places)
        except (InvalidArgumentError, FileNotFoundError):
            # The bytes are parsed before they are hashed: damage may show as a malformed file.
            self.registry.verify(digest)
            raise
        for spec, sha256 in zip(manifest.files, hashes, strict=True):
            if sha256 != spec.sha256:
                self.registry.verify(digest)  # says so itself, unless an upload healed it by now
                raise damaged_blob(spec, digest)
        if parsed.draft_vocabulary and self.head_rows is not None:
            slot = layout.slots[DRAFT_KEY]
            self.head_rows(parsed.draft_vocabulary, _place(buffer, slot).view(slot.shape))
        return PackedAdapter(digest=digest, buffer=buffer, layout=layout, pinned=buffer.is_pinned())

    def _allocate(self, parsed: ParsedAdapter) -> tuple[AdapterLayout, Tensor]:
        shapes = {key: entry.shape for key, entry in parsed.tensors.items()}
        vocabulary = parsed.draft_vocabulary
        if vocabulary:
            shapes[DRAFT_KEY] = (len(vocabulary), self.shapes.hidden_size)
        return self.allocate(shapes, parsed.scales, parsed.facts.num_heads, vocabulary)


def _place(buffer: Tensor, slot: TensorSlot) -> Tensor:
    """A slot's elements, flat."""
    return buffer[slot.offset : slot.offset + math.prod(slot.shape)]
