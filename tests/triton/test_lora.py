"""Segmented LoRA of adapters' own buffers: right, and a token has the bits that it has alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lorastack.kernels.packing import allocate, view
from lorastack.kernels.segmented_lora import segmented_lora_reference
from lorastack.kernels.triton import lora
from lorastack.kernels.triton.lora_plan import (
    PAIR_FIELDS,
    TILE_FIELDS,
    AdapterTable,
    LoraArrays,
    LoraUse,
    embedding_site,
    plan_lora,
    site_of,
    workspace_size,
)
from lorastack.layout import EMBED, GROUPS, LM_HEAD, NO_LAYER, ModelShapes, Part
from lorastack.lora.weights import LM_HEAD_GROUP, LoraWeights

SHAPES = ModelShapes(
    architecture="x",
    hidden_size=40,
    intermediate_size=72,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=150,
    max_context=64,
    tie_word_embeddings=False,
)
CHUNK, TOKENS = 32, 24  # so few inputs that a matrix has several chunks


def adapter(
    ranks: Mapping[tuple[int, str], int], seed: int, dtype: torch.dtype, device: torch.device
) -> LoraWeights:
    """Random weights in a buffer of the project's layout."""
    shapes = {}
    for (layer, target), rank in ranks.items():
        outputs, inputs = SHAPES.target_shape(target)
        shapes[layer, target, Part.A] = (rank, inputs)
        shapes[layer, target, Part.B] = (outputs, rank)
    layout, buffer = allocate(shapes, dict.fromkeys(ranks, 0.5), 0, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for key, shape in shapes.items():
        values = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        view(buffer, layout, key).copy_(values)
    return LoraWeights.from_buffer(buffer.to(device), layout)


class Adapters:
    """Three adapters of mixed ranks that lack targets, groups or what is beside the layers."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        ranks: list[dict[tuple[int, str], int]] = [
            {(0, "q_proj"): 5, (0, "v_proj"): 16, (1, "q_proj"): 8, (1, "up_proj"): 33}
            | {(1, "down_proj"): 19, (NO_LAYER, EMBED): 5},
            {(1, "q_proj"): 3, (1, "k_proj"): 1, (1, "v_proj"): 24, (1, "gate_proj"): 8}
            | {(1, "down_proj"): 16, (NO_LAYER, LM_HEAD): 4, (NO_LAYER, EMBED): 8},
            {(0, "o_proj"): 2},
        ]
        self.device, self.dtype = device, dtype
        self.weights = [adapter(each, seed, dtype, device) for seed, each in enumerate(ranks)]
        self.tables = [
            AdapterTable.of(each.groups, each.embedding and each.embedding.group, 2, device)
            for each in self.weights
        ]

    def uses(self, stacks: Sequence[Stack]) -> list[LoraUse]:
        return [
            LoraUse(start, end, self.tables[index], scale)
            for start, end, members in stacks
            for index, scale in members
        ]


Stack = tuple[int, int, list[tuple[int, float]]]  # start, end, (adapter, scale)
# A tile and a bit of it, a single token, one that nothing of this layer adapts; the rest is base.
STACKS: list[Stack] = [
    (1, 20, [(0, 0.25), (1, 2.0)]),
    (20, 21, [(1, 1.0)]),
    (22, 23, [(2, 1.0)]),
]


def lay_out(
    uses: Sequence[LoraUse], num_tokens: int, device: torch.device
) -> tuple[LoraArrays[Tensor, Tensor], Tensor]:
    """A step's numbers and workspace, all else poisoned."""
    poison = -(1 << 40)
    host = {
        "counts": np.zeros(2, np.int32),
        "adapted_T": np.full(num_tokens, 1 << 20, np.int32),
        "tiles": np.full((num_tokens, TILE_FIELDS), -(1 << 20), np.int32),
        "pairs": np.full((4 * num_tokens, PAIR_FIELDS), poison, np.int64),
    }
    plan_lora(uses, num_tokens, LoraArrays(**host))
    step = LoraArrays(**{name: torch.tensor(host[name], device=device) for name in host})
    return step, torch.full((3, workspace_size(uses)), torch.nan, device=device)


def deltas(
    adapters: Adapters, stacks: Sequence[Stack], x_TI: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """What a site's kernels write over NaN, and the tokens that are adapted."""
    device = adapters.device
    step, shrunk = lay_out(adapters.uses(stacks), len(x_TI), device)
    outputs = widths(key)
    site = site_of(*key, SHAPES.num_layers)
    delta_TO = torch.full((len(x_TI), sum(outputs)), torch.nan, device=device)
    lora.shrink(x_TI, step, site, shrunk, len(x_TI), chunk=CHUNK)
    inputs, dtype = x_TI.shape[1], adapters.dtype
    lora.expand(
        shrunk, step, site, outputs, inputs, dtype, delta_TO, len(x_TI), chunk=CHUNK
    )  # fmt: skip
    return delta_TO, step.adapted_T > 0


def widths(key: tuple[int, int]) -> list[int]:
    targets = (*GROUPS, (LM_HEAD,))[key[1]]
    return [SHAPES.target_shape(target)[0] for target in targets]


def random_inputs(key: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    target = (*GROUPS, (LM_HEAD,))[key[1]][0]
    inputs = SHAPES.target_shape(target)[1]
    generator = torch.Generator().manual_seed(7)
    return torch.randn(TOKENS, inputs, generator=generator).to(dtype).to(device)


def wanted(
    adapters: Adapters, stacks: Sequence[Stack], x_TI: Tensor, key: tuple[int, int]
) -> Tensor:
    outputs = widths(key)
    out_TO = torch.zeros(len(x_TI), sum(outputs), dtype=torch.float64, device=x_TI.device)
    segments = [
        (start, end, scale, adapters.weights[index].groups[key])
        for start, end, members in stacks
        for index, scale in members
        if key in adapters.weights[index].groups
    ]
    segmented_lora_reference(x_TI, out_TO.split(outputs, 1), segments)
    return out_TO


@pytest.mark.parametrize("key", [(1, 0), (1, 3), LM_HEAD_GROUP])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_equals_the_reference_and_each_stack_alone(
    key: tuple[int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    adapters = Adapters(dtype, device)
    x_TI = random_inputs(key, dtype, device)
    delta_TO, adapted_T = deltas(adapters, STACKS, x_TI, key)
    wanted_TO = wanted(adapters, STACKS, x_TI, key)
    error = (delta_TO - wanted_TO)[adapted_T].norm() / wanted_TO.norm()
    assert error < tolerance
    assert torch.equal(delta_TO[adapted_T] == 0, wanted_TO[adapted_T] == 0)
    assert delta_TO[~adapted_T].isnan().all()
    assert adapted_T.nonzero().flatten().tolist() == [*range(1, 21), 22]

    members = STACKS[0][2]
    for tokens in (slice(7, 9), slice(18, 19)):  # of the first stack
        own_TI = x_TI[1:20][tokens].contiguous()
        alone_TO, _ = deltas(adapters, [(0, len(own_TI), members)], own_TI, key)
        assert torch.equal(alone_TO, delta_TO[1:20][tokens])


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 257), (torch.bfloat16, 256)])
def test_what_is_shrunk_is_rounded_to_the_dtype(
    dtype: torch.dtype, value: int, device: torch.device
) -> None:
    """257 lies between two neighbours of bfloat16."""
    adapters = Adapters(dtype, device)
    group = adapters.weights[2].groups[0, 1]
    group.a_RI.zero_()
    group.a_RI[0, :3], group.a_RI[0, -1] = torch.tensor([128, 64, 64]), 1
    group.targets[0].b_OR.fill_(1)
    x_TI = torch.ones(1, group.a_RI.shape[1], dtype=dtype, device=device)
    delta_TO, _ = deltas(adapters, [(0, 1, [(2, 2.0)])], x_TI, (0, 1))
    assert (delta_TO == value).all()  # the adapter's own scale is a half


def test_scales_that_float32_cannot_hold_are_infinite(device: torch.device) -> None:
    adapters = Adapters(torch.float32, device)
    x_TI = random_inputs((1, 0), torch.float32, device)
    delta_TO, _ = deltas(adapters, [(0, 1, [(0, 1e300)]), (1, 2, [(1, 1.0)])], x_TI, (1, 0))
    assert not delta_TO[0, : widths((1, 0))[0]].isfinite().any()
    assert delta_TO[1].isfinite().all()


@pytest.mark.parametrize(("own", "asked"), [(0.0, 1e39), (1e39, 0.0), (1e-3, 1e39), (1e39, 1e-3)])
def test_the_scale_is_one_product(own: float, asked: float, device: torch.device) -> None:
    """That float32 holds, though not both of its factors."""
    adapters = Adapters(torch.float32, device)
    groups = adapters.weights[2].groups
    (target,) = groups[0, 1].targets
    group = replace(groups[0, 1], targets=(replace(target, scale=own),))
    adapters.weights[2] = LoraWeights({(0, 1): group}, None)
    adapters.tables[2] = AdapterTable.of({(0, 1): group}, None, 2, device)
    x_TI = random_inputs((0, 1), torch.float32, device)[:1]
    delta_TO, _ = deltas(adapters, [(0, 1, [(2, asked)])], x_TI, (0, 1))
    wanted_TO = wanted(adapters, [(0, 1, [(2, asked)])], x_TI, (0, 1))
    torch.testing.assert_close(delta_TO.double(), wanted_TO, rtol=1e-5, atol=0)


def test_more_tiles_than_a_grid_has_programs(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs take several in turn."""
    adapters = Adapters(torch.float32, device)
    x_TI = random_inputs((1, 3), torch.float32, device)[:8]
    stacks: list[Stack] = [(token, token + 1, [(token % 2, 1.0)]) for token in range(8)]
    monkeypatch.setattr(lora, "MAX_TILES", 3)
    delta_TO, _ = deltas(adapters, stacks, x_TI, (1, 3))
    wanted_TO = wanted(adapters, stacks, x_TI, (1, 3)).float()
    torch.testing.assert_close(delta_TO, wanted_TO, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_embeddings_of_adapted_tokens(
    dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    adapters = Adapters(dtype, device)
    token_ids_T = torch.randint(0, SHAPES.vocab_size, (TOKENS,), dtype=torch.int32, device=device)
    hidden_TH = torch.randn(TOKENS, SHAPES.hidden_size, device=device)
    hidden_TH[0] = -0.0
    step, _ = lay_out(adapters.uses(STACKS), TOKENS, device)
    site = embedding_site(SHAPES.num_layers)
    out_TH = hidden_TH.clone()
    lora.add_embedding(token_ids_T, step, site, SHAPES.vocab_size, dtype, out_TH, TOKENS)
    wanted_TH = torch.zeros(TOKENS, SHAPES.hidden_size, dtype=torch.float64, device=device)
    for start, end, members in STACKS:
        for index, scale in members:
            if (weights := adapters.weights[index].embedding) is not None:
                a_TR = weights.a_RV.T[token_ids_T[start:end].long()].double()
                wanted_TH[start:end] += weights.scale * scale * a_TR @ weights.b_HR.T.double()
    error = (out_TH - hidden_TH - wanted_TH).norm() / wanted_TH.norm()
    assert error < tolerance
    base = [0, 21, 23]
    assert torch.equal(out_TH[base].view(torch.int32), hidden_TH[base].view(torch.int32))
