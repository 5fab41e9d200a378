"""Steps in which rows decode, and what a backend does for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lorastack.kernels.heads import HeadsWeights
from lorastack.kernels.triton.launch import launch
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.triton.device import Device, device_of
from lorastack.model.context import ForwardBatch, HeadsAsk, RowSpan, SampledTree
from lorastack.request import SamplingParams, TokenSource
from lorastack.speculation.tree import Tree
from tests.helpers.launches import launching

PAGE = 16
CANDIDATES = 4  # of a head


def decoding(
    shapes: ModelShapes,
    rows: int,
    past: int,
    *,
    nodes: int = 1,
    loras: Sequence[LoraWeights] = (),
    heads: HeadsWeights | None = None,
) -> ForwardBatch:
    """Rows behind `past` tokens, each with a tree of so many nodes and one of the LoRAs in turn."""
    parents = (-1, *((node - 1) // 2 for node in range(1, nodes)))
    tree = Tree(tuple(range(4, 4 + nodes)), parents, (TokenSource.HEADS,) * nodes)
    pages = -(-(past + nodes) // PAGE)
    ask = None if heads is None else HeadsAsk(heads, CANDIDATES)
    spans, trees, segments = [], [], []
    for row in range(rows):
        start = row * nodes
        table = range(row * pages, row * pages + pages)
        chain = tree.parents if nodes > 1 else None
        spans.append(RowSpan(start, start + nodes, table, past, chain))
        trees.append(SampledTree(tree, start, SamplingParams(), 7, ask))
        if loras:
            segments.append(Segment(start, start + nodes, loras[row % len(loras)], 1.0))
    ids = [token % shapes.vocab_size for _ in range(rows) for token in tree.tokens]
    batch = LoraBatch(tuple(segments))
    return ForwardBatch(ids, tuple(spans), range(rows * nodes), batch, trees)


def num_pages(batch: ForwardBatch) -> int:
    """That a cache for the step needs."""
    return 1 + max(max(row.block_table) for row in batch.rows)


def counting(device: torch.device) -> tuple[Device, Counter[str]]:
    """The calls of a device that captures no graphs, and how often it copied either way."""
    calls, copies = device_of(device), Counter[str]()
    upload, download = calls.upload, calls.download

    def counted(name: str, plain: Callable[..., None]) -> Callable[..., None]:
        def call(*tensors: Any) -> None:
            copies[name] += 1
            plain(*tensors)

        return call

    calls.captures = False
    calls.upload = counted("upload", upload)  # type: ignore[method-assign]
    calls.download = counted("download", download)  # type: ignore[method-assign]
    return calls, copies


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """By kernel."""
    counts = Counter[str]()

    def counted(kernel: Any, grid: Sequence[int], *args: object, **settings: object) -> None:
        counts[kernel.fn.__name__] += 1
        launch(kernel, grid, *args, **settings)

    with launching(counted):
        yield counts
