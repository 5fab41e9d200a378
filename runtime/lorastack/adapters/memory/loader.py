"""From stored files to tensors: what an upload is checked with, what the host cache loads with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorastack.adapters.formats.parse import (
    ParsedAdapter,
    check_base,
    check_chat_template,
    check_values,
    parse,
)
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.adapters.formats.tensorfile import TensorEntry, pieces
from lorastack.adapters.formats.tokens import TokenId, check_tokens
from lorastack.adapters.memory.fill import DTYPES, fill
from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.store.blobs import damaged_blob
from lorastack.adapters.store.registry import Registry
from lorastack.errors import InvalidArgumentError
from lorastack.layout import (
    DRAFT_KEY,
    EMBED,
    LM_HEAD,
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
HeadRows = Callable[[Sequence[int], Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """Everything an upload must pass; given to `Upload.commit`.

    base_names: what the server's model is called, aliases too. base_weight: base tensor name
    (model.embed_tokens.weight, lm_head.weight) -> that tensor, to compare copies that PEFT saved.
    dtype: what the server computes with, and adapters are converted to. base_token: a token's id in
    the base model's tokenizer, None if it has none; without, tokenizer files are not looked at.
    check_template: compiles a chat template; raises what is wrong with it.
    """

    shapes: ModelShapes
    base_names: tuple[str, ...]
    base_weight: Callable[[str], Tensor]
    dtype: torch.dtype = torch.float32
    base_token: TokenId | None = None
    check_template: Callable[[str], None] | None = None

    def __call__(self, files: Mapping[str, Path], *, accept_base: bool = False) -> ParsedAdapter:
        """accept_base: another base model's name is no objection.

        Raises InvalidArgumentError or FailedPreconditionError.
        """
        parsed = parse(files, self.shapes)
        warnings = check_base(parsed, self.base_names, accept=accept_base)
        check_chat_template(parsed, files)
        if self.base_token is not None:
            warnings += check_tokens(
                files,
                self.base_token,
                template=parsed.chat_template,
                trained_rows=self._trained_rows(parsed),
            )
        check_values(parsed)
        if parsed.chat_template is not None and self.check_template is not None:
            self.check_template(parsed.chat_template)
        for entry in parsed.tensors.values():
            _check_fits(entry, self.dtype)
        for name, entry in parsed.base_copies.items():
            _check_copy(name, entry, self.base_weight(name))
        return replace(parsed, warnings=warnings)

    def _trained_rows(self, parsed: ParsedAdapter) -> int:
        """Rows of the vocabulary that the LoRA adapts."""
        adapts = any(target in (EMBED, LM_HEAD) for _, target in parsed.scales)
        return self.shapes.vocab_size if adapts else 0


def _check_fits(entry: TensorEntry, dtype: torch.dtype) -> None:
    """No finite value may become an infinity in the dtype that the server computes with."""
    stored = DTYPES[entry.dtype]
    if torch.finfo(stored).max <= torch.finfo(dtype).max:
        return
    for data in pieces(entry):
        if not bool(torch.from_numpy(data).view(stored).to(dtype).isfinite().all()):
            name = str(dtype).removeprefix("torch.")
            raise invalid(
                f"tensor {entry.name} contains more than {name} holds, which this server computes "
                "with: start it with another --dtype"
            )


def _check_copy(name: str, entry: TensorEntry, base: Tensor) -> None:
    """A copy of a base weight must be that weight, up to the rounding of either's dtype."""
    if entry.shape != base.shape:
        raise invalid(
            f"tensor {entry.name} has shape {list(entry.shape)}, but the base model's {name} has "
            f"{list(base.shape)}"
        )
    base_X = base.detach().to("cpu").view(-1)
    as_base = as_copy = True
    start = 0
    for data in pieces(entry):
        copy_X = torch.from_numpy(data).view(DTYPES[entry.dtype])
        part_X = base_X[start : start + len(copy_X)]
        as_base = as_base and torch.equal(copy_X.to(base.dtype), part_X)
        as_copy = as_copy and torch.equal(part_X.to(copy_X.dtype), copy_X)
        if not (as_base or as_copy):
            raise unsupported(
                f"tensor {entry.name} differs from the base model's {name}: adapters that change "
                "whole base weights are not supported (resized or trained embeddings)"
            )
        start += len(copy_X)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Digest -> packed adapter, for the host cache. Blobs are checked against their digests.

    allocate: an adapter's shapes, scales, number of heads, tree and draft vocabulary -> its layout
    and a buffer for it, in the form and dtype that the model's backend reads. head_rows: writes the
    base lm_head's rows of these tokens to a tensor [N, H].
    """

    registry: Registry
    shapes: ModelShapes
    allocate: Allocate
    head_rows: HeadRows

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
        if parsed.draft_vocabulary:
            slot = layout.slots[DRAFT_KEY]
            self.head_rows(parsed.draft_vocabulary, _place(buffer, slot).view(slot.shape))
        return PackedAdapter(digest=digest, buffer=buffer, layout=layout)

    def _allocate(self, parsed: ParsedAdapter) -> tuple[AdapterLayout, Tensor]:
        shapes = {key: entry.shape for key, entry in parsed.tensors.items()}
        vocabulary = parsed.draft_vocabulary
        if vocabulary:
            shapes[DRAFT_KEY] = (len(vocabulary), self.shapes.hidden_size)
        return self.allocate(shapes, parsed.scales, parsed.num_heads, vocabulary)


def _place(buffer: Tensor, slot: TensorSlot) -> Tensor:
    """A slot's elements, flat."""
    return buffer[slot.offset : slot.offset + math.prod(slot.shape)]
