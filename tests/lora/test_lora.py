"""LoRA of the decoder against PEFT: every target, ranks, stacks, mixed batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorastack.layout import (
    EMBED,
    HEADS,
    LAYER_TARGETS,
    LM_HEAD,
    Part,
    TensorKey,
)
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, RowSpan
from tests.helpers.adapters import write_lora
from tests.helpers.packed import pack, read_weights
from tests.helpers.reference import Reference
from tests.helpers.tiny import VOCAB_SIZE, build_llama, shapes_of

CPU = torch.device("cpu")
TARGETS = (*LAYER_TARGETS, EMBED, LM_HEAD)
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
# PEFT speaks up about tied weights and about adding an adapter to an adapted model.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft.*")


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (count,), generator=generator).tolist()


def logits(
    decoder: Backend,
    prompts: Sequence[list[int]],
    stacks: Sequence[Sequence[tuple[LoraWeights, float]]],
) -> list[Tensor]:
    """[T, V] of every prompt, all in one batch, each with its stack."""
    kv = decoder.make_kv(8 * len(prompts), 8)
    rows: list[RowSpan] = []
    segments: list[Segment] = []
    start = 0
    for index, (prompt, stack) in enumerate(zip(prompts, stacks, strict=True)):
        end = start + len(prompt)
        rows.append(RowSpan(start, end, range(8 * index, 8 * index + 8), 0))
        segments += [Segment(start, end, weights, scale) for weights, scale in stack]
        start = end
    ids = [token for prompt in prompts for token in prompt]
    lora = LoraBatch(tuple(segments))
    result = decoder.forward(ForwardBatch(ids, tuple(rows), range(len(ids)), lora), kv).logits_XV
    return list(result.split([len(prompt) for prompt in prompts]))


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora-model")
    return build_llama(
        folder, tie_word_embeddings=request.param == "tied", attention_bias=True, mlp_bias=True
    )


@pytest.fixture(scope="module")
def decoder(model: Path) -> Backend:
    return load_backend(model, device=CPU, dtype=torch.float32, max_context=None)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_equals_peft(target: str, model: Path, decoder: Backend, tmp_path: Path):
    shapes = shapes_of(model)
    folder = write_lora(tmp_path / "lora", shapes, rank=5, alpha=12.0, targets=[target])
    reference = Reference(model, {"lora": folder})
    prompt = tokens(17)
    (result,) = logits(decoder, [prompt], [[(read_weights(folder, shapes), 1.0)]])
    torch.testing.assert_close(result, reference.logits(prompt, [("lora", 1.0)]), **TOLERANCE)
    # The adapter must matter, or the comparison says nothing.
    assert (result - reference.logits(prompt)).abs().max() > 0.05


def test_mixed_batch_of_stacks_and_ranks_equals_peft(model: Path, decoder: Backend, tmp_path: Path):
    """Base rows between adapted ones, ranks 2 and 11, stacks with scales, one adapter twice."""
    shapes = shapes_of(model)
    folders = {
        "everything": write_lora(tmp_path / "a", shapes, seed=1, rank=2, targets=TARGETS),
        "some": write_lora(
            tmp_path / "b", shapes, seed=2, rank=11, targets=("k_proj", "up_proj"), layers=[1]
        ),
        "head": write_lora(tmp_path / "c", shapes, seed=3, rank=3, targets=(LM_HEAD, "o_proj")),
    }
    weights = {name: read_weights(folder, shapes) for name, folder in folders.items()}
    reference = Reference(model, folders)
    stacks: list[list[tuple[str, float]]] = [
        [],
        [("everything", 1.0)],
        [("everything", 0.5), ("some", 1.5)],
        [],
        [("head", 1.0)],
        [("everything", 1.0), ("head", 0.25), ("some", 1.0)],
        [("everything", 1.0)],
    ]
    prompts = [tokens(3 + 4 * index, seed=index) for index in range(len(stacks))]
    results = logits(
        decoder, prompts, [[(weights[name], scale) for name, scale in stack] for stack in stacks]
    )
    for prompt, stack, result in zip(prompts, stacks, results, strict=True):
        torch.testing.assert_close(result, reference.logits(prompt, stack), **TOLERANCE)


def test_base_rows_are_untouched(model: Path, decoder: Backend, tmp_path: Path):
    shapes = shapes_of(model)
    lora = read_weights(write_lora(tmp_path / "lora", shapes, targets=TARGETS), shapes)
    prompts = [tokens(6, 1), tokens(6, 2), tokens(6, 3)]
    plain = logits(decoder, prompts, [[], [], []])
    mixed = logits(decoder, prompts, [[], [(lora, 1.0)], []])
    assert torch.equal(plain[0], mixed[0]) and torch.equal(plain[2], mixed[2])
    assert not torch.allclose(plain[1], mixed[1])


def test_weights_are_views_of_the_buffer():
    tensors: dict[TensorKey, Tensor] = {
        (2, "k_proj", Part.A): torch.randn(3, 8),
        (2, "k_proj", Part.B): torch.randn(4, 3),
        (2, "q_proj", Part.A): torch.randn(2, 8),
        (2, "q_proj", Part.B): torch.randn(6, 2),
        (0, HEADS, Part.WEIGHT): torch.randn(8, 8),
        (0, HEADS, Part.BIAS): torch.randn(8),
    }
    scales = {(2, "k_proj"): 3.0, (2, "q_proj"): 2.0}
    layout, buffer = pack(tensors, scales, 1, torch.float32)
    weights = LoraWeights.from_buffer(buffer, layout)
    assert weights.groups.keys() == {(2, 0)} and weights.embedding is None
    group = weights.groups[2, 0]
    assert [(t.index, t.rank, t.scale) for t in group.targets] == [
        (0, slice(0, 2), 2.0),
        (1, slice(2, 5), 3.0),
    ]
    buffer.zero_()
    assert not group.a_RI.any() and not any(target.b_OR.any() for target in group.targets)


def test_an_empty_batch_is_false():
    assert not LoraBatch()
    assert LoraBatch((Segment(0, 1, LoraWeights({}, None), 1.0),))
