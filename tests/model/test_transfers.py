"""A step of the torch backend brings its numbers to the device once, and its tokens back once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorastack.kernels.linear import DEVICE_GRAIN, copy_rows
from lorastack.kernels.segmented_lora import GroupLora, TargetLora
from lorastack.layout import GROUPS, ModelShapes
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LM_HEAD_GROUP, EmbeddingLora, LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, RowSpan, SampledTree
from lorastack.model.kv import Move
from lorastack.request import SamplingParams, TokenSource
from lorastack.speculation.tree import Tree
from tests.helpers.tiny import build_llama
from tests.helpers.transfers import META, Transfers, traced

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
NODES = (-1, 0, 0, 1)


def backend(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Backend:
    return load_backend(folder, device=META, dtype=dtype, max_context=None, native=False)


def lora_of(shapes: ModelShapes, rank: int) -> LoraWeights:
    """One that adapts everything."""

    def adapted(inputs: int, *outputs: int) -> GroupLora:
        targets = [
            TargetLora(i, slice(i * rank, (i + 1) * rank), made(size, rank), 1.0)
            for i, size in enumerate(outputs)
        ]
        return GroupLora(made(rank * len(outputs), inputs), tuple(targets))

    def made(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    hidden, vocabulary = shapes.hidden_size, shapes.vocab_size
    groups = {LM_HEAD_GROUP: adapted(hidden, vocabulary)}
    for layer in range(shapes.num_layers):
        for index, names in enumerate(GROUPS):
            sizes = [shapes.target_shape(name) for name in names]
            groups[layer, index] = adapted(sizes[0][1], *(outputs for outputs, _ in sizes))
    return LoraWeights(groups, EmbeddingLora(made(rank, vocabulary), made(hidden, rank), 1.0))


def mixed_step(shapes: ModelShapes) -> ForwardBatch:
    """Chunks, single tokens and trees of several lengths, with a stack of LoRAs over some."""
    counts = [(5, None, 0), (3, None, 9), (1, None, 30), (1, None, 700), (4, NODES, 20)]
    counts += [(2, (-1, 0), 40)]
    rows, start = [], 0
    for index, (count, parents, committed) in enumerate(counts):
        table = range(100 * index, 100 * index + 100)
        rows.append(RowSpan(start, start + count, table, committed, parents, 8))
        start += count
    greedy = SamplingParams()
    tree = Tree((0,) * 4, NODES, (TokenSource.MODEL,) * 4)
    one, two = (Segment(2, end, lora_of(shapes, rank), 0.5) for end, rank in ((12, 4), (9, 3)))
    return ForwardBatch(
        [7] * start,
        tuple(rows),
        [4, 7, 8, 9, 10, 11, 12, 13],
        LoraBatch((one, two)),
        [SampledTree(tree, 4, greedy, 3)],
    )


def step(backend: Backend, batch: ForwardBatch) -> Transfers:
    kv = backend.make_kv(600, 16)
    return traced(lambda: backend.forward(batch, kv))


@pytest.mark.parametrize("model", ["llama", "mistral", "dynamic"])
def test_a_step_goes_up_once_before_its_layers_and_comes_down_once(
    tmp_path: Path, tiny_llama: Path, tiny_mistral: Path, model: str
) -> None:
    """With windows and with frequencies of its own for each prompt too."""
    if model == "dynamic":
        folder = build_llama(tmp_path / "model", rope_parameters=DYNAMIC)
    else:
        folder = {"llama": tiny_llama, "mistral": tiny_mistral}[model]
    made = backend(folder)
    found = step(made, mixed_step(made.shapes))
    assert (found.num_up, found.num_down) == (1, 1)
    assert found.events.index("up") < found.events.index("embedding")
    assert found.events[-1] == "down"


def test_a_step_that_nobody_wants_anything_of_is_waited_for(tiny_llama: Path) -> None:
    """Else a prompt's chunk would be timed by how long its launch takes."""
    batch = ForwardBatch([5, 6, 7], (RowSpan(0, 3, [0], 0),), [])
    found = step(backend(tiny_llama), batch)
    assert (found.num_up, found.num_down) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_device_are_never_rounded_to_16_bits(
    tiny_llama: Path, dtype: torch.dtype
) -> None:
    made = backend(tiny_llama, dtype)
    hidden_XH = torch.empty(3, made.shapes.hidden_size, dtype=dtype, device=META)
    found = traced(lambda: made.logits(hidden_XH, LoraBatch()))
    assert made.logits(hidden_XH, LoraBatch()).dtype == torch.float32
    assert found.events[-1] == "mm" and "_to_copy" not in found.events


def test_rows_of_lm_head_stay_on_the_device_in_a_few_pieces() -> None:
    weight_VH, out_NH = torch.empty(32_000, 4096, device=META), torch.empty(4096, 4096, device=META)
    found = traced(lambda: copy_rows(weight_VH.__getitem__, torch.arange(4096), out_NH))
    assert (found.num_up, found.num_down) == (1, 0)
    assert found.events.count("index") == 4096 * 4096 // DEVICE_GRAIN


def test_moves_of_kv_go_up_once(tiny_llama: Path) -> None:
    kv = backend(tiny_llama).make_kv(8, 4)
    moves = [Move([3, 5], [4, 6], [1, 2]), Move([2, 7], [5], [3])]
    found = traced(lambda: kv.move(moves))
    assert (found.num_up, found.num_down) == (1, 0)
