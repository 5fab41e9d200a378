"""A step as one call of the native library: Llama and Mistral layers on a CPU.

A row's bits depend on its own tokens, adapters and past alone: not on the rows beside it, on how
its prompt was cut, on a cached prefix or on a tree around it (see kernels/native/common.h).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import embedding

from lorastack.kernels.linear import copy_rows
from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa, usable
from lorastack.kernels.native.matrix import (
    LANES,
    PAD,
    PackedMatrix,
    matrix_rows,
    pack_matrix,
    pack_pair,
)
from lorastack.kernels.native.memory import HugePages
from lorastack.kernels.ops import fastest_ops
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.kernels.segmented_lora import GroupLora, TargetLora
from lorastack.layout import GROUPS, LAYER_TARGETS, ModelShapes
from lorastack.lora.linear import add_embedding
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LM_HEAD_GROUP, LoraWeights
from lorastack.model.backends.accept import accept_trees
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache
from lorastack.model.weights import DecoderWeights, Packing, load_weights

ROWS = 32  # rows that the kernels may read at once
MAX_HEAD_DIM = 256  # for which attention on tiles has room
FIRST_TARGET = (0, *accumulate(map(len, GROUPS)))  # where each group begins in LAYER_TARGETS


def native_isa(
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    kind: Kind | None = None,
    at_most: Isa | None = None,
) -> Isa | None:
    """The best instruction set that runs this model here, None where the native kernels cannot.

    at_most: none better than it.
    """
    if device.type != "cpu" or config.dynamic_rope_begin is not None:
        return None
    if kind is not None and dtype != torch.bfloat16:
        return None
    return next((isa for isa in usable(dtype, at_most) if fits(isa, config.shapes)), None)


def fits(isa: Isa, shapes: ModelShapes) -> bool:
    """True if the kernels for `isa` take a model of these shapes."""
    size = shapes.head_dim
    if size > MAX_HEAD_DIM:
        return False
    if isa.multiplies_pairs:
        return shapes.hidden_size % PAD == 0 and size % PAD == 0
    whole = all(heads * size % LANES == 0 for heads in (shapes.num_heads, shapes.num_kv_heads))
    return whole and size % 2 == 0


class NativeBackend:
    """See `Backend`. Owns the packed weights and the scratch memory of a step."""

    overlaps = False

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights[PackedMatrix],
        dtype: torch.dtype,
        isa: Isa,
        kind: Kind | None = None,
    ) -> None:
        """kind: what the weights are quantised to."""
        library = native.library()
        assert library is not None, "native_isa() comes first"
        self.name = f"native {isa.label}"
        self.shapes = config.shapes
        self.device = torch.device("cpu")
        self.dtype = dtype
        self.quantization = "" if kind is None else kind.value
        self.dynamic_rope_begin = config.dynamic_rope_begin
        self.ops = fastest_ops(dtype, config.shapes.hidden_size, self.device, isa)
        self._library = library
        self._config = config
        self._weights = weights
        self._isa = isa
        self._half = dtype == torch.bfloat16
        self._scratch = torch.empty(0, dtype=torch.uint8)
        positions = torch.arange(config.shapes.max_context, dtype=torch.float32)
        angle_PF = positions[:, None] * config.inv_freq
        self._cosine_PF = angle_PF.cos().mul_(config.rope_scale)
        self._sine_PF = angle_PF.sin().mul_(config.rope_scale)
        self._models: WeakKeyDictionary[KVCache, _Model] = WeakKeyDictionary()
        self._targets: WeakKeyDictionary[LoraWeights, _Targets] = WeakKeyDictionary()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        dtype: torch.dtype,
        isa: Isa,
        kind: Kind | None = None,
    ) -> NativeBackend:
        """kind: what weights are quantised to. Raises what `load_weights` raises."""
        pages, device = HugePages(), torch.device("cpu")
        quantise = fastest_ops(dtype, config.shapes.hidden_size, device, isa).quantise
        weights = load_weights(
            checkpoint,
            config,
            device=device,
            dtype=dtype,
            packing=Packing(
                dense=partial(pack_matrix, kind=kind, quantise=quantise, keep=pages.copy),
                pair=partial(pack_pair, kind=kind, quantise=quantise, keep=pages.copy),
                head=partial(pack_matrix, kind=head_kind(kind), quantise=quantise, keep=pages.copy),
                copies=True,
            ),
        )
        return cls(config, weights, dtype, isa, kind)

    def make_kv(self, num_pages: int, page_size: int) -> KVCache:
        """See `Backend`."""
        return KVCache(self.shapes, num_pages, page_size, self.dtype, self.device)

    def prepare(self, kv: KVCache) -> None:
        """See `Backend`."""

    def forward(
        self, batch: ForwardBatch, kv: KVCache, meanwhile: Callable[[], None] | None = None
    ) -> Outputs:
        """See `Backend`."""
        num_outputs, uses = len(batch.outputs), batch.lora.segments
        # Views are taken before the library runs: it leaves nothing of torch in the caches.
        hidden_XH = self._padded(num_outputs)[:num_outputs]
        logits_XV = torch.empty(num_outputs, self.shapes.vocab_size)
        peaks_X, best_X = torch.empty(num_outputs), torch.empty(num_outputs, dtype=torch.int64)
        token_ids_T = torch.tensor(batch.token_ids, dtype=torch.int64)
        segments = _segments(uses, [self._targets_of(segment.weights) for segment in uses])
        rows = _Rows(batch)
        embedded_TH = self._embedded(token_ids_T, batch.lora)
        step = native.Step(
            rows.address,
            ctypes.addressof(segments),
            token_ids_T.data_ptr(),
            None if embedded_TH is None else embedded_TH.data_ptr(),
            rows.outputs,
            hidden_XH.data_ptr(),
            logits_XV.data_ptr(),
            peaks_X.data_ptr(),
            best_X.data_ptr(),
            None,
            len(batch.rows),
            len(token_ids_T),
            len(segments),
            num_outputs,
            torch.get_num_threads(),
        )
        model = self._model(kv)
        step.scratch = self._scratch_of(self._library.lorastack_scratch_bytes(model, step))
        self._library.lorastack_forward(model, step)
        accepted = accept_trees(self.ops, logits_XV, best_X, batch.trees)
        return Outputs(hidden_XH, logits_XV, peaks_X, best_X, accepted)

    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """See `Backend`."""
        shapes, num_rows = self.shapes, len(hidden_XH)
        x_XH = self._padded(num_rows)
        x_XH[:num_rows] = hidden_XH
        out_XV = torch.empty(num_rows, shapes.vocab_size)
        adapting = [each for each in lora.segments if LM_HEAD_GROUP in each.weights.groups]
        heads = [each.weights.groups[LM_HEAD_GROUP] for each in adapting]
        targets = [_Targets.of([_target(head, head.targets[0])]) for head in heads]
        segments = _segments(adapting, targets)
        head = native.LmHead(
            self._weights.lm_head.struct,
            ctypes.addressof(segments),
            x_XH.data_ptr(),
            out_XV.data_ptr(),
            None,
            len(segments),
            num_rows,
            shapes.vocab_size,
            shapes.hidden_size,
            torch.get_num_threads(),
            self._isa,
            self._half,
        )
        self._library.lorastack_logits(head)
        return out_XV

    def head_rows(self, ids: Sequence[int], out_NH: Tensor) -> None:
        """See `Backend`."""
        copy_rows(partial(matrix_rows, self._weights.lm_head), torch.tensor(ids), out_NH)

    def adopt(self, lora: LoraWeights) -> None:
        """See `Backend`."""
        self._targets_of(lora)

    def _embedded(self, token_ids_T: Tensor, lora: LoraBatch) -> Tensor | None:
        """float32 [T, H] where a LoRA adapts the embedding; None: the library looks it up."""
        if all(each.weights.embedding is None for each in lora.segments):
            return None
        hidden_TH = embedding(token_ids_T, self._weights.embed_VH)
        add_embedding(token_ids_T, hidden_TH, lora)
        return hidden_TH.float()

    def _padded(self, num_rows: int) -> Tensor:
        """Uninitialised [num_rows rounded up, H]."""
        return torch.empty(-(-num_rows // ROWS) * ROWS, self.shapes.hidden_size, dtype=self.dtype)

    def _scratch_of(self, nbytes: int) -> int:
        """The address of at least so many bytes, on a cache line; the same memory at every call."""
        if len(self._scratch) < nbytes + 64:
            self._scratch = torch.empty(2 * nbytes + 64, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // 64) * 64

    def _model(self, kv: KVCache) -> native.Model:
        if kv not in self._models:
            self._models[kv] = self._describe(kv)
        return self._models[kv].model

    def _describe(self, kv: KVCache) -> _Model:
        shapes, weights = self.shapes, self._weights
        layers = (native.Layer * shapes.num_layers)(
            *(
                native.Layer(
                    layer.attention_norm.data_ptr(),
                    layer.mlp_norm.data_ptr(),
                    layer.qkv.struct,
                    layer.o.struct,
                    layer.gate_up.struct,
                    layer.down.struct,
                    kv.data[layer.index].data_ptr(),
                )
                for layer in weights.layers
            )
        )
        model = native.Model(
            ctypes.addressof(layers),
            weights.lm_head.struct,
            weights.embed_VH.data_ptr(),
            weights.norm.data_ptr(),
            self._cosine_PF.data_ptr(),
            self._sine_PF.data_ptr(),
            shapes.num_layers,
            shapes.hidden_size,
            shapes.intermediate_size,
            shapes.num_heads,
            shapes.num_kv_heads,
            shapes.head_dim,
            kv.page_size,
            shapes.vocab_size,
            self._config.window or 0,
            self._config.rms_eps,
            self._isa,
            self._half,
        )
        return _Model(model, layers)

    def _targets_of(self, weights: LoraWeights) -> _Targets:
        """[num_layers][7] targets, then lm_head's; made once an adapter."""
        if weights not in self._targets:
            num_layers = self.shapes.num_layers
            targets = [native.Target()] * (num_layers * len(LAYER_TARGETS) + 1)
            for (layer, group), adapted in weights.groups.items():
                start = -1
                if (layer, group) != LM_HEAD_GROUP:
                    start = layer * len(LAYER_TARGETS) + FIRST_TARGET[group]
                for target in adapted.targets:
                    targets[start + target.index] = _target(adapted, target)
            self._targets[weights] = _Targets.of(targets)
        return self._targets[weights]


@dataclass(frozen=True, slots=True)
class _Model:
    """A model for the library. layers: memory that `model` points to."""

    model: native.Model
    layers: ctypes.Array[native.Layer]


@dataclass(frozen=True, slots=True)
class _Targets:
    """An adapter's targets for the library, and their largest rank."""

    table: ctypes.Array[native.Target]
    address: int
    max_rank: int

    @classmethod
    def of(cls, targets: Sequence[native.Target]) -> _Targets:
        table = (native.Target * len(targets))(*targets)
        return cls(table, ctypes.addressof(table), max(target.rank for target in targets))


class _Rows:
    """The rows of a step for the library, which borrows them until it returns."""

    def __init__(self, batch: ForwardBatch) -> None:
        self._numbers = array("i", batch.outputs)  # first of all, see `outputs`
        places = []
        for row in batch.rows:
            pages = self._add(row.block_table)
            places.append((pages, None if row.parents is None else self._add(row.parents)))
        base = self._numbers.buffer_info()[0]
        size = self._numbers.itemsize
        self._rows = (native.Row * len(batch.rows))(
            *(
                native.Row(
                    base + pages * size,
                    None if parents is None else base + parents * size,
                    row.start,
                    row.end,
                    row.committed,
                )
                for row, (pages, parents) in zip(batch.rows, places, strict=True)
            )
        )

    @property
    def address(self) -> int:
        return ctypes.addressof(self._rows)

    @property
    def outputs(self) -> int:
        """Address of the batch's outputs."""
        return self._numbers.buffer_info()[0]

    def _add(self, numbers: Sequence[int]) -> int:
        """Appends `numbers` and returns the place of the first."""
        start = len(self._numbers)
        self._numbers.extend(numbers)
        return start


def _segments(
    segments: Sequence[Segment], targets: Sequence[_Targets]
) -> ctypes.Array[native.Segment]:
    """Segments for the library. targets: one a segment; the caller keeps them alive."""
    return (native.Segment * len(segments))(
        *(
            native.Segment(table.address, each.start, each.end, each.scale, table.max_rank)
            for each, table in zip(segments, targets, strict=True)
        )
    )


def _target(adapted: GroupLora, target: TargetLora) -> native.Target:
    a_RI = adapted.a_RI[target.rank]
    return native.Target(a_RI.data_ptr(), target.b_OR.data_ptr(), target.scale, len(a_RI))
