"""A step of models of every shape: near plain torch, and the same bits in any company."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.best import best_torch
from lorastack.kernels.native.matrix import LANES
from lorastack.layout import ModelShapes
from lorastack.lora.weights import LoraWeights
from tests.helpers.examples import at_most
from tests.helpers.isas import FUSING, Variant, each_variant, here, needs_two
from tests.helpers.native import (
    RowPart,
    Twins,
    Uses,
    config_of,
    kinds,
    lay_out,
    random_lora,
    run,
    twins,
)

VARIANTS = each_variant()
RANKS = (0, 1, 5, 16, 33, 64, 65)
NUM_PAGES = 300


def model_of(variant: Variant, chance: random.Random, poison: float | None = None) -> Twins:
    hidden_size, head_dim = 32 * chance.randint(1, 5), chance.choice((32, 64, 96, 160))
    if not variant.isa.multiplies_pairs and chance.random() < 0.7:
        hidden_size = chance.choice((hidden_size, 33, 40, 72, 100))
        head_dim = chance.choice((6, 20, 80, 96, 100, 128, 256))
    step = LANES // math.gcd(LANES, head_dim)  # all heads together are whole panels
    kv_heads = step * chance.randint(1, max(1, 3 // step))
    shapes = ModelShapes(
        architecture="LlamaForCausalLM",
        hidden_size=hidden_size,
        intermediate_size=chance.randint(1, 130),
        num_layers=chance.randint(1, 2),
        num_heads=kv_heads * chance.choice((1, 2, 3, 5)),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=chance.randint(3, 80),
        max_context=256,
        tie_word_embeddings=False,
    )
    window = chance.choice((None, None, 1, 7, 16, 40))
    biases = chance.random() < 0.5
    config, seed = config_of(shapes, window=window, biases=biases), chance.randrange(999)
    return twins(config, variant, seed, poison, chance.choice(kinds(variant.dtype)))


def loras_of(model: Twins, chance: random.Random) -> tuple[list[LoraWeights], list[LoraWeights]]:
    pairs = [random_lora(model.config.shapes, model.dtype, chance, RANKS) for _ in range(3)]
    return [mine for mine, _ in pairs], [plain for _, plain in pairs]


def tokens(model: Twins, chance: random.Random, count: int) -> list[int]:
    """Any but 0, which may be poisoned."""
    return [chance.randrange(1, model.config.shapes.vocab_size) for _ in range(count)]


def stack(chance: random.Random) -> Uses:
    return chance.choice(((), ((0, 1.0),), ((1, 0.5), (2, 1.0)), ((2, -1.0),)))


def pages_of(free: list[int], page_size: int, count: int) -> list[int]:
    """Of a row of so many tokens; in no order, as `free` is."""
    return [free.pop() for _ in range(-(-count // page_size))]


def tree(chance: random.Random, count: int) -> tuple[int, ...]:
    return (-1, *(chance.randrange(node) for node in range(1, count)))


def near(model: Twins, found_TV: Tensor, expected_TV: Tensor) -> None:
    if model.dtype == torch.float32:
        torch.testing.assert_close(found_TV, expected_TV, atol=5e-4, rtol=5e-4)
    else:
        assert (found_TV - expected_TV).norm() <= 0.05 * expected_TV.norm() + 0.05


@pytest.mark.parametrize("variant", VARIANTS)
@at_most(30)
@given(st.integers(0, 2**30))
def test_every_shape_equals_torch(variant: Variant, seed: int) -> None:
    chance = random.Random(seed)
    model = model_of(variant, chance)
    mine, plain = loras_of(model, chance)
    page_size = chance.choice((1, 3, 4, 16))
    caches = model.caches(NUM_PAGES, page_size)
    for parts in two_steps(model, chance, page_size):
        found = run(model.native, mine, caches[0], parts)
        expected = run(model.reference, plain, caches[1], parts)
        near(model, torch.cat(found), torch.cat(expected))


def two_steps(
    model: Twins, chance: random.Random, page_size: int
) -> tuple[list[RowPart], list[RowPart]]:
    """Prompts in one step, then more of them, trees and single tokens behind them in another."""
    free = list(range(NUM_PAGES))
    chance.shuffle(free)
    first, second = [], []
    for _ in range(chance.randint(1, 4)):
        done, more = chance.choice((1, 2, 15, 16, 17, 33, 64)), chance.choice((1, 1, 4, 9))
        pages, uses = pages_of(free, page_size, done + more), stack(chance)
        first.append(RowPart(tokens(model, chance, done), 0, pages, uses))
        parents = tree(chance, more) if chance.random() < 0.5 else None
        second.append(RowPart(tokens(model, chance, more), done, pages, uses, parents))
    return first, second


@needs_two(*FUSING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@at_most(30)
@given(st.integers(0, 2**30))
def test_what_widens_and_fuses_has_the_same_bits(dtype: torch.dtype, seed: int) -> None:
    """PLAIN is not among them: it rounds products where there is nothing to fuse them with."""
    results = []
    for isa in here(*FUSING):
        chance = random.Random(seed)
        model = model_of(Variant(isa, dtype), chance)
        loras, _ = loras_of(model, chance)
        kv, _ = model.caches(NUM_PAGES, 4)
        both = two_steps(model, chance, 4)
        found = [torch.cat(run(model.native, loras, kv, parts)) for parts in both]
        results.append((*found, kv.data.nan_to_num()))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("variant", VARIANTS)
@at_most(20)
@given(st.integers(0, 2**30))
def test_what_is_wanted_of_a_step(variant: Variant, seed: int) -> None:
    """Any tokens' results, or none's: those of a step that gives all, and the best of them."""
    chance = random.Random(seed)
    model = model_of(variant, chance)
    loras, _ = loras_of(model, chance)
    kv, _ = model.caches(NUM_PAGES, 4)
    parts, free = [], list(range(NUM_PAGES))
    for _ in range(chance.randint(1, 4)):
        count = chance.choice((1, 3, 30))
        parts.append(
            RowPart(tokens(model, chance, count), 0, pages_of(free, 4, count), stack(chance))
        )
    every = range(sum(len(part.ids) for part in parts))
    wanted = [place for place in every if chance.random() < 0.4]
    whole = model.native.forward(lay_out(loras, parts, every), kv)
    some = model.native.forward(lay_out(loras, parts, wanted), kv)
    assert torch.equal(some.logits_XV, whole.logits_XV[wanted])
    assert torch.equal(some.hidden_XH, whole.hidden_XH[wanted])
    peaks_X, best_X = best_torch(some.logits_XV) if wanted else (some.peaks_X, some.best_X)
    assert torch.equal(some.peaks_X, peaks_X) and torch.equal(some.best_X, best_X)


@pytest.mark.parametrize("variant", VARIANTS)
@at_most(30)
@given(st.integers(0, 2**30))
def test_bits_of_every_shape_do_not_depend_on_company(variant: Variant, seed: int) -> None:
    """A row cut in two, among others and on other pages; then on the pages of a cached prefix."""
    chance = random.Random(seed)
    model = model_of(variant, chance)
    loras, _ = loras_of(model, chance)
    page_size = chance.choice((1, 4, 16))
    free = list(range(NUM_PAGES))
    chance.shuffle(free)
    kv, _ = model.caches(NUM_PAGES, page_size)
    size, uses = chance.choice((20, 40, 75)), stack(chance)
    ids, pages = tokens(model, chance, size), pages_of(free, page_size, size)
    (alone,) = run(model.native, loras, kv, [RowPart(ids, 0, pages, uses)])

    free = list(range(NUM_PAGES))
    chance.shuffle(free)
    kv, _ = model.caches(NUM_PAGES, page_size)
    pages, cut = pages_of(free, page_size, size), chance.randint(1, size - 1)
    for begin, end in ((0, cut), (cut, size)):
        count = chance.choice((1, 6, 20))
        parents = tree(chance, count) if chance.random() < 0.5 else None
        other = RowPart(
            tokens(model, chance, count),
            0,
            pages_of(free, page_size, count),
            stack(chance),
            parents,
        )
        parts = [RowPart(ids[begin:end], begin, pages, uses), other]
        chance.shuffle(parts)
        place = parts.index(other) ^ 1
        assert torch.equal(run(model.native, loras, kv, parts)[place], alone[begin:end])

    shared = cut // page_size
    done = shared * page_size
    behind = pages[:shared] + pages_of(free, page_size, size - done)
    (cached,) = run(model.native, loras, kv, [RowPart(ids[done:], done, behind, uses)])
    assert torch.equal(cached, alone[done:])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@at_most(20)
@given(st.integers(0, 2**30))
def test_what_is_not_finite_stays_with_its_descendants(
    variant: Variant, poison: float, seed: int
) -> None:
    """Token 0's embedding is bad: its node and those below it are NaN, everything else as ever."""
    chance = random.Random(seed)
    model = model_of(variant, chance, poison)
    loras, plain = loras_of(model, chance)
    free = list(range(NUM_PAGES))
    chance.shuffle(free)
    count = chance.choice((5, 18, 37))
    parents = tree(chance, count) if chance.random() < 0.5 else None
    bad = RowPart(tokens(model, chance, count), 0, pages_of(free, 4, count), stack(chance), parents)
    good = RowPart(tokens(model, chance, 9), 0, pages_of(free, 4, 9), stack(chance))
    parts = [bad, good] if chance.random() < 0.5 else [good, bad]
    kv, _ = model.caches(NUM_PAGES, 4)
    clean = run(model.native, loras, kv, parts)

    node = chance.randrange(count)
    bad.ids[node] = 0
    kv, _ = model.caches(NUM_PAGES, 4)
    found = run(model.native, loras, kv, parts)
    assert torch.equal(found[parts.index(good)], clean[parts.index(good)])
    below = descendants(node, parents, count)
    mine, before = found[parts.index(bad)], clean[parts.index(bad)]
    others = [each for each in range(count) if each not in below]
    assert torch.equal(mine[others], before[others])
    assert not mine[node].isfinite().all()
    path = [*ancestors(node, parents), node]
    _, kv = model.caches(NUM_PAGES, 4)
    chain = RowPart([bad.ids[each] for each in path], 0, bad.pages, bad.uses)
    expected = run(model.reference, plain, kv, [chain])[0][-1]
    assert torch.equal(mine[node].isnan(), expected.isnan())


@pytest.mark.parametrize("variant", VARIANTS)
@at_most(20)
@given(st.integers(0, 2**30))
def test_a_bad_key_is_not_dropped(variant: Variant, seed: int) -> None:
    """Its value is sound, yet who sees it is NaN, as a softmax over its score is."""
    chance = random.Random(seed)
    model = model_of(variant, chance)
    kv, _ = model.caches(16, 4)
    pages, past = chance.sample(range(16), 10), 37
    window = model.config.window or past + 1
    run(model.native, [], kv, [RowPart(tokens(model, chance, past), 0, pages)])
    slot = chance.randrange(past)
    kv.data[0, pages[slot // 4], 0, 0, slot % 4, 0] = torch.nan
    (found,) = run(model.native, [], kv, [RowPart(tokens(model, chance, 1), past, pages)])
    assert bool(found.isnan().all()) == (slot > past - window)


def ancestors(node: int, parents: tuple[int, ...] | None) -> list[int]:
    if parents is None:
        return list(range(node))
    path: list[int] = []
    while (node := parents[node]) >= 0:
        path.insert(0, node)
    return path


def descendants(node: int, parents: tuple[int, ...] | None, count: int) -> set[int]:
    """And itself."""
    found = {node}
    for each in range(node + 1, count):
        if parents is None or parents[each] in found:
            found.add(each)
    return found
