"""The native step: equal to the torch backend, and to itself bit by bit in whatever company."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorastack.kernels.quantize import Kind
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.backends.native import NativeBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import load_config
from lorastack.model.kv import KVCache, Move
from tests.helpers.adapters import write_lora
from tests.helpers.examples import at_most
from tests.helpers.isas import each_variant
from tests.helpers.mixed_loras import LORAS, STACKS
from tests.helpers.native import RowPart, Uses, lay_out, run
from tests.helpers.packed import read_weights
from tests.helpers.tiny import VOCAB_SIZE, build_llama, build_mistral, shapes_of

CPU = torch.device("cpu")
PAGE, NUM_PAGES = 4, 256
MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (build_llama, {}),
    "biases": (build_llama, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 88}),
    "one-kv-head": (build_llama, {"num_key_value_heads": 1, "head_dim": 96}),
    "window": (build_mistral, {"sliding_window": 9, "head_dim": 64}),
    "int8": (build_mistral, {"head_dim": 64}),
    "int4": (build_llama, {"attention_bias": True, "mlp_bias": True, "intermediate_size": 88}),
}
KINDS = {kind.value: kind for kind in Kind}  # of the models that are named so


@dataclass(frozen=True)
class World:
    """A tiny model on one instruction set in one dtype, and the same in torch and float32."""

    native: Backend
    reference: Backend
    loras: list[LoraWeights]
    reference_loras: list[LoraWeights]

    def cache(self, backend: Backend) -> KVCache:
        kv = backend.make_kv(NUM_PAGES, PAGE)
        kv.data.fill_(torch.nan)  # what an earlier owner left must not matter
        return kv


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build, fields = MODELS[request.param]
    folder = build(tmp_path_factory.mktemp("models") / request.param, **fields)
    if request.param in KINDS:  # what both read must be the same for codes to be
        file = folder / "model.safetensors"
        rounded = {name: each.bfloat16() for name, each in load_file(file).items()}
        save_file(rounded, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def lora_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base, shapes = tmp_path_factory.mktemp("loras"), shapes_of(folder)
    return [write_lora(base / name, shapes, **fields) for name, fields in LORAS.items()]


@pytest.fixture(scope="module", params=each_variant())
def world(request: pytest.FixtureRequest, folder: Path, lora_folders: list[Path]) -> World:
    (isa, dtype), config = request.param, load_config(folder, None)
    kind = KINDS.get(folder.name) if dtype == torch.bfloat16 else None  # all that they multiply
    backend = NativeBackend.load(Checkpoint(folder), config, dtype, isa, kind)
    shapes = shapes_of(folder)
    reference = load_backend(
        folder, device=CPU, dtype=torch.float32, max_context=None, native=False, quantize=kind
    )
    return World(
        backend,
        reference,
        [read_weights(path, shapes, dtype) for path in lora_folders],
        [read_weights(path, shapes) for path in lora_folders],
    )


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (count,), generator=generator).tolist()


def company(chance: random.Random, free: list[int]) -> RowPart:
    """Another row: a prompt, a tree or a single token, on pages of its own."""
    count = chance.choice((1, 1, 3, 7, 40))
    tree = chance.random() < 0.3
    parents = tuple(chance.randrange(-1 if j == 0 else 0, max(j, 1)) for j in range(count))
    pages = [free.pop() for _ in range(12)]
    return RowPart(
        tokens(count, chance.randrange(1000)),
        0,
        pages,
        chance.choice(STACKS),
        (-1, *parents[1:]) if tree else None,
    )


def test_a_mixed_batch_equals_torch(world: World) -> None:
    chance = random.Random(3)
    free = list(range(NUM_PAGES))
    parts = [company(chance, free) for _ in range(14)]
    found = run(world.native, world.loras, world.cache(world.native), parts)
    expected = run(world.reference, world.reference_loras, world.cache(world.reference), parts)
    for mine, theirs in zip(found, expected, strict=True):
        if world.native.dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=1e-4)
        else:
            assert (mine - theirs).norm() < 0.04 * theirs.norm()


@at_most(25)
@given(st.integers(0, 2**20))
def test_a_rows_bits_do_not_depend_on_its_company(world: World, seed: int) -> None:
    """A prompt at once and alone; then in pieces, some as trees, among other rows."""
    chance = random.Random(seed)
    stack = chance.choice(STACKS)
    ids = tokens(48, seed)
    kv = world.cache(world.native)
    pages = list(range(12))
    chance.shuffle(pages)
    (alone,) = run(world.native, world.loras, kv, [RowPart(ids, 0, pages, stack)])

    free = list(range(NUM_PAGES))
    chance.shuffle(free)
    kv, pages = world.cache(world.native), [free.pop() for _ in range(16)]
    done = 0
    while done < len(ids):
        size = min(chance.choice((1, 2, 5, 30)), len(ids) - done)
        others = [company(chance, free[:]) for _ in range(1)]
        place = chance.randrange(2)
        if 1 < size <= 5:
            mine, path = tree_of(ids[done : done + size], done, pages, stack, chance)
        else:
            mine, path = RowPart(ids[done : done + size], done, pages, stack), list(range(size))
        results = run(world.native, world.loras, kv, [*others[:place], mine, *others[place:]])
        assert torch.equal(results[min(place, len(others))][path], alone[done : done + size])
        kv.move([Move(pages, [done + node for node in path], list(range(done, done + size)))])
        done += size


def tree_of(
    ids: Sequence[int],
    committed: int,
    pages: Sequence[int],
    stack: Uses,
    chance: random.Random,
) -> tuple[RowPart, list[int]]:
    """A tree with `ids` as one of its paths, and the nodes of that path."""
    nodes, parents, path = [ids[0]], [-1], [0]
    for token in ids[1:]:
        parent = path[-1]
        wrong = [chance.randrange(4, VOCAB_SIZE) for _ in range(chance.randrange(3))]
        place = chance.randrange(len(wrong) + 1)
        path.append(len(nodes) + place)
        nodes += [*wrong[:place], token, *wrong[place:]]
        parents += [parent] * (len(wrong) + 1)
    return RowPart(nodes, committed, pages, stack, tuple(parents)), path


@pytest.mark.parametrize("outputs", [(), (2,), (0, 1, 5, 6, 40)])
def test_only_the_wanted_tokens_get_results(world: World, outputs: tuple[int, ...]) -> None:
    chance, free = random.Random(11), list(range(NUM_PAGES))
    parts = [company(chance, free) for _ in range(9)]
    everywhere = list(outputs)
    for decoder, loras in ((world.native, world.loras), (world.reference, world.reference_loras)):
        batch = lay_out(loras, parts, range(sum(len(part.ids) for part in parts)))
        every = decoder.forward(batch, world.cache(decoder))
        found = decoder.forward(replace(batch, outputs=outputs), world.cache(decoder))
        torch.testing.assert_close(found.logits_XV, every.logits_XV[everywhere])
        torch.testing.assert_close(found.hidden_XH, every.hidden_XH[everywhere])
        assert torch.equal(found.best_X, found.logits_XV.argmax(dim=-1))
        assert torch.equal(found.peaks_X, found.logits_XV.amax(dim=-1))


def test_threads_do_not_change_bits(world: World) -> None:
    chance = random.Random(5)
    free = list(range(NUM_PAGES))
    parts = [company(chance, free) for _ in range(6)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(world.native, world.loras, world.cache(world.native), parts)
        torch.set_num_threads(3)
        three = run(world.native, world.loras, world.cache(world.native), parts)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
