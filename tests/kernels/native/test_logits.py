"""Rows times a packed matrix, with LoRA: every size, against exact sums."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.native.isa import Isa
from lorastack.layout import ModelShapes
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LM_HEAD_GROUP, LoraWeights
from tests.helpers.guarded import guarded
from tests.helpers.isas import Variant, each_variant
from tests.helpers.native import Twins, config_of, kinds, random_lora, twins

VARIANTS = each_variant()
RANKS = (0, 1, 3, 16, 17, 64, 65, 130)


def head(variant: Variant, chance: random.Random) -> Twins:
    """A model of which only the head matters."""
    hidden_size = 32 * chance.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 65))
    if not variant.isa.multiplies_pairs and chance.random() < 0.5:
        hidden_size = chance.choice((1, 33, 40, 100, 2071))
    shapes = ModelShapes(
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=chance.randint(1, 300),
        max_context=16,
        tie_word_embeddings=False,
    )
    seed = chance.randrange(2**20)
    return twins(config_of(shapes), variant, seed, kind=chance.choice(kinds(variant.dtype)))


def segments_of(loras: list[LoraWeights], rows: int, chance: random.Random) -> LoraBatch:
    """Of any length, empty ones too, that may cover each other as stacks do."""
    segments = []
    for _ in range(chance.randrange(6)):
        begin = chance.randint(0, rows)
        end = chance.randint(begin, min(rows, begin + chance.choice((1, 5, 70))))
        segments.append(Segment(begin, end, chance.choice(loras), chance.choice((1.0, 0.5))))
    return LoraBatch(tuple(segments))


def exact(model: Twins, hidden_XH: Tensor, lora: LoraBatch, isa: Isa) -> tuple[Tensor, Tensor]:
    """In float64, from the numbers that the library reads; and how far it may be off.

    AMX rounds shrunk tokens to bfloat16, as PEFT does in that dtype.
    """
    identity = torch.eye(model.config.shapes.hidden_size)
    weight_VH = model.reference.logits(identity, LoraBatch()).T.double()
    logits_XV = hidden_XH.double() @ weight_VH.T
    rounded_XV = 2e-5 * (1 + logits_XV.abs())
    for segment in lora.segments:
        if adapted := segment.weights.groups.get(LM_HEAD_GROUP):
            (target,) = adapted.targets
            rows = slice(segment.start, segment.end)
            shrunk_XR = hidden_XH[rows].double() @ adapted.a_RI.double().T
            scale = target.scale * segment.scale
            logits_XV[rows] += scale * shrunk_XR @ target.b_OR.double().T
            if isa is Isa.AMX:
                most = (scale * shrunk_XR).abs() @ target.b_OR.double().abs().T
                rounded_XV[rows] += 2**-8 * most
    return logits_XV, rounded_XV


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=60)
@given(st.integers(0, 2**30))
def test_equals_exact_sums_and_a_row_alone(variant: Variant, seed: int) -> None:
    chance = random.Random(seed)
    model = head(variant, chance)
    loras = [random_lora(model.config.shapes, model.dtype, chance, RANKS)[0] for _ in range(3)]
    rows = chance.choice((1, 2, 3, 11, 12, 13, 16, 17, 31, 32, 33, 70))
    generator = torch.Generator().manual_seed(seed)
    hidden_XH = torch.randn(rows, model.config.shapes.hidden_size, generator=generator)
    hidden_XH = guarded(hidden_XH.to(model.dtype))
    lora = segments_of(loras, rows, chance)
    found_XV = model.native.logits(hidden_XH, lora)
    expected_XV, rounded_XV = exact(model, hidden_XH, lora, variant.isa)
    assert bool(((found_XV - expected_XV).abs() <= rounded_XV).all())
    row = chance.randrange(rows)
    mine = tuple(
        Segment(0, 1, each.weights, each.scale)
        for each in lora.segments
        if each.start <= row < each.end
    )
    alone_XV = model.native.logits(hidden_XH[row : row + 1], LoraBatch(mine))
    assert torch.equal(found_XV[row], alone_XV[0])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@settings(max_examples=30)
@given(st.integers(0, 2**30))
def test_what_is_not_finite_stays_in_its_row(variant: Variant, poison: float, seed: int) -> None:
    chance = random.Random(seed)
    model = head(variant, chance)
    loras = [random_lora(model.config.shapes, model.dtype, chance, RANKS)[0]]
    rows = chance.choice((2, 13, 33))
    hidden_XH = torch.randn(rows, model.config.shapes.hidden_size).to(model.dtype)
    lora = LoraBatch((Segment(0, rows, loras[0], 1.0),))
    clean_XV = model.native.logits(hidden_XH, lora)
    row, column = chance.randrange(rows), chance.randrange(hidden_XH.shape[1])
    hidden_XH[row, column] = poison
    found_XV = model.native.logits(hidden_XH, lora)
    others = [other for other in range(rows) if other != row]
    assert torch.equal(found_XV[others], clean_XV[others])
    expected_XV, rounded_XV = exact(model, hidden_XH, lora, variant.isa)
    assert torch.equal(found_XV[row].isfinite(), expected_XV[row].isfinite())
    number_V = expected_XV[row].isfinite()
    off_V = (found_XV[row] - expected_XV[row]).abs()[number_V]
    assert bool((off_V <= rounded_XV[row, number_V]).all())
