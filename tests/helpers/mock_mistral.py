"""Mistral-7B's shapes without its memory: weights, adapters and KV on the meta device.

What a step asks of the device can be counted so, and what it costs the host can be timed. Any value
that the host tried to read from the device would raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lorastack.kernels.heads import HeadsWeights, PrivateWeights
from lorastack.kernels.segmented_lora import GroupLora, TargetLora
from lorastack.kernels.triton.weight import Weight, pack_weight
from lorastack.layout import GROUPS
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LM_HEAD_GROUP, EmbeddingLora, LoraWeights
from lorastack.model.backends.triton.backend import TritonBackend
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch, HeadsAsk, RowSpan, SampledTree
from lorastack.model.kv import KVCache
from lorastack.model.weights import DecoderWeights, LayerWeights
from lorastack.request import SamplingParams, TokenSource
from lorastack.speculation.tree import Tree
from tests.helpers.shapes import MISTRAL_7B

META, DTYPE = torch.device("meta"), torch.bfloat16
PAGE, PAST = 16, 1000
SHAPES = replace(MISTRAL_7B, max_context=4096)


class MockDevice:
    """Copies go nowhere, graphs replay nothing. copies: all there were, and waits for them.

    replays: how many there were.
    """

    captures = True

    def __init__(self) -> None:
        self.copies: list[str] = []
        self.replays = 0

    def host_buffer(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, host: Tensor, device: Tensor) -> None:
        assert (host.device.type, device.device.type) == ("cpu", "meta")
        self.copies.append("upload")

    def free_to_write(self) -> None:
        pass

    def download(self, device: Tensor, host: Tensor) -> None:
        assert (host.device.type, device.device.type) == ("cpu", "meta")
        self.copies.append("download")

    def wait(self) -> None:
        self.copies.append("wait")

    def mark(self) -> None:
        pass

    def seconds(self, began: None, ended: None) -> float:
        return 0.0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.replays += 1

        return replay


class MockMistral:
    """A backend and a cache, on a device that does nothing."""

    def __init__(self) -> None:
        self.device = MockDevice()
        self.backend = TritonBackend(_config(), _weights(), META, DTYPE, None, self.device)
        self.kv: KVCache = self.backend.make_kv(8192, PAGE)

    def step(
        self,
        rows: int,
        loras: Sequence[LoraWeights] = (),
        nodes: int = 1,
        heads: HeadsWeights | None = None,
    ) -> ForwardBatch:
        """Rows that decode a token and its tree, each with one of the LoRAs in turn."""
        spans, trees, segments = [], [], []
        pages = -(-(PAST + nodes) // PAGE)
        ask = None if heads is None else HeadsAsk(heads, 4)
        parents = tuple(max(node // 2 - (node % 2 == 0), 0) for node in range(1, nodes))
        tree = Tree(tuple(range(nodes)), (-1, *parents), (TokenSource.HEADS,) * nodes)
        for row in range(rows):
            start = row * nodes
            table = range(row * pages, row * pages + pages)
            spans.append(RowSpan(start, start + nodes, table, PAST, tree.parents))
            trees.append(SampledTree(tree, start, SamplingParams(temperature=0.5), 7, ask))
            if loras:
                use = loras[row % len(loras)]
                segments.append(Segment(start, start + nodes, use, 1.0))
        ids = list(range(rows * nodes))
        return ForwardBatch(ids, tuple(spans), ids, LoraBatch(tuple(segments)), trees)


def mock_lora(rank: int, *, beside_layers: bool = False) -> LoraWeights:
    """All projections, as views of nothing. beside_layers: lm_head and the embedding as well."""
    groups = {}
    for layer in range(SHAPES.num_layers):
        for group, names in enumerate(GROUPS):
            targets = tuple(
                TargetLora(
                    index,
                    slice(index * rank, (index + 1) * rank),
                    _empty(SHAPES.target_shape(name)[0], rank),
                    1.0,
                )
                for index, name in enumerate(names)
            )
            a_RI = _empty(rank * len(names), SHAPES.target_shape(names[0])[1])
            groups[layer, group] = GroupLora(a_RI, targets)
    if not beside_layers:
        return LoraWeights(groups, None)
    size, vocab_size = SHAPES.hidden_size, SHAPES.vocab_size
    target = TargetLora(0, slice(0, rank), _empty(vocab_size, rank), 1.0)
    groups[LM_HEAD_GROUP] = GroupLora(_empty(rank, size), (target,))
    return LoraWeights(groups, EmbeddingLora(_empty(rank, vocab_size), _empty(size, rank), 1.0))


def mock_heads(
    num_heads: int, num_outputs: int, num_blocks: int = 1, private_rank: int = 0
) -> HeadsWeights:
    """With a draft vocabulary."""
    size = SHAPES.hidden_size
    ids_N = torch.empty(num_outputs, dtype=torch.int64, device=META)
    weight, bias = _empty(num_blocks, num_heads, size, size), _empty(num_blocks, num_heads, size)
    private = None
    if private_rank:
        private = PrivateWeights(
            _empty(num_blocks, num_heads, private_rank, size),
            _empty(num_blocks, num_heads, size, private_rank),
        )
    return HeadsWeights(weight, bias, _empty(num_outputs, size), ids_N, private)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=META)


def _config() -> DecoderConfig:
    return DecoderConfig(
        shapes=SHAPES,
        rms_eps=1e-5,
        window=None,
        attention_bias=False,
        mlp_bias=False,
        inv_freq=torch.ones(SHAPES.head_dim // 2),
        rope_scale=1.0,
        context_limit=SHAPES.max_context,
    )


def _weights() -> DecoderWeights[Weight]:
    size, inner = SHAPES.hidden_size, SHAPES.intermediate_size
    query, key = SHAPES.num_heads * SHAPES.head_dim, SHAPES.num_kv_heads * SHAPES.head_dim
    layers = tuple(
        LayerWeights(
            index=index,
            attention_norm=_empty(size),
            qkv=pack_weight(_empty(query + 2 * key, size)),
            o=pack_weight(_empty(size, query)),
            mlp_norm=_empty(size),
            gate_up=pack_weight(_empty(2 * inner, size)),
            down=pack_weight(_empty(size, inner)),
        )
        for index in range(SHAPES.num_layers)
    )
    lm_head = pack_weight(_empty(SHAPES.vocab_size, size))
    return DecoderWeights(_empty(SHAPES.vocab_size, size), layers, _empty(size), lm_head)
