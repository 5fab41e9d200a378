"""From stored files to tensors: what an upload is checked with, what the host cache loads with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorastack.adapters.formats import ParsedAdapter, check_base, check_values, parse
from lorastack.adapters.host import PackedAdapter
from lorastack.adapters.medusa import Choices
from lorastack.adapters.refusal import invalid, unsupported
from lorastack.adapters.registry import Registry
from lorastack.adapters.tensorfile import TensorEntry, read_bytes
from lorastack.layout import AdapterLayout, ModelShapes, TensorKey

Pack = Callable[
    [Mapping[TensorKey, Tensor], Mapping[tuple[int, str], float], int, Choices],
    tuple[AdapterLayout, Tensor],
]
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_tensors(parsed: ParsedAdapter) -> dict[TensorKey, Tensor]:
    """The adapter's tensors in their stored dtypes and shapes, on the CPU."""
    return {key: _read(entry) for key, entry in parsed.tensors.items()}


def _read(entry: TensorEntry) -> Tensor:
    data = torch.from_numpy(read_bytes(entry))
    return data.view(_DTYPES[entry.dtype]).reshape(entry.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """Everything an upload must pass; given to `Upload.commit`.

    base_names: what the server's model is called, aliases too. base_weight: base tensor name
    (model.embed_tokens.weight, lm_head.weight) -> that tensor, to compare copies that PEFT saved.
    """

    shapes: ModelShapes
    base_names: tuple[str, ...]
    base_weight: Callable[[str], Tensor]

    def __call__(self, files: Mapping[str, Path], *, accept_base: bool = False) -> ParsedAdapter:
        """accept_base: another base model's name is no objection.

        Raises InvalidArgumentError or FailedPreconditionError.
        """
        parsed = parse(files, self.shapes)
        check_base(parsed, self.base_names, accept=accept_base)
        check_values(parsed)
        for name, entry in parsed.base_copies.items():
            _check_copy(name, entry, self.base_weight(name))
        return parsed


def _check_copy(name: str, entry: TensorEntry, base: Tensor) -> None:
    """A copy of a base weight must be that weight, up to the rounding of either's dtype."""
    copy = _read(entry)
    if copy.shape != base.shape:
        raise invalid(
            f"tensor {entry.name} has shape {list(copy.shape)}, but the base model's {name} has "
            f"{list(base.shape)}"
        )
    base = base.detach().to("cpu")
    if torch.equal(copy.to(base.dtype), base) or torch.equal(base.to(copy.dtype), copy):
        return
    raise unsupported(
        f"tensor {entry.name} differs from the base model's {name}: adapters that change whole "
        "base weights are not supported (resized or trained embeddings)"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Digest -> packed adapter, for the host cache. Blobs are checked against their digests."""

    registry: Registry
    shapes: ModelShapes
    pack: Pack

    def __call__(self, digest: str) -> PackedAdapter:
        """Raises NotFoundError, DataLossError, or what `parse` raises (another base model)."""
        self.registry.verify(digest)
        try:
            parsed = parse(self.registry.files(digest), self.shapes)
            tensors = read_tensors(parsed)
        except FileNotFoundError:
            self.registry.verify(digest)  # says whether it was deleted or lost
            raise
        layout, buffer = self.pack(tensors, parsed.scales, parsed.num_heads, parsed.choices)
        return PackedAdapter(digest=digest, buffer=buffer, layout=layout)
