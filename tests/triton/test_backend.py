"""The whole step on Triton's kernels: equal to torch, and to itself bit by bit in any company."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorastack.kernels.quantize import Kind
from lorastack.kernels.segmented_lora import GroupLora
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.base import Backend
from lorastack.model.backends.triton import backend as backend_module
from lorastack.model.kv import KVCache, Move
from tests.helpers.fake_device import LateDevice
from tests.helpers.launches import launching
from tests.helpers.mixed_loras import ALL, STACKS, WIDE
from tests.helpers.native import RowPart, lay_out, run
from tests.helpers.tiny import build_llama, build_mistral
from tests.helpers.triton_world import World, build_world, tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 16.0}
MODELS: dict[str, tuple[Callable[..., Path], dict[str, Any], Kind | None]] = {
    "llama": (build_llama, {}, None),
    "biases": (build_llama, {"attention_bias": True, "mlp_bias": True, "num_layers": 2}, None),
    "window": (build_mistral, {"sliding_window": 5, "num_attention_heads": 3}, None),
    "dynamic": (build_llama, {"rope_parameters": DYNAMIC, "max_position_embeddings": 4}, None),
    "int8": (build_mistral, {}, Kind.INT8),
    "int4": (build_llama, {}, Kind.INT4),
}


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def world_of(name: str, dtype: torch.dtype, device: torch.device, root: Path) -> World:
    build, fields, kind = MODELS[name]
    return build_world(root, build, fields, device, dtype, kind)


@pytest.fixture(scope="module")
def world(
    dtype: torch.dtype, device: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> World:
    return world_of("llama", dtype, device, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def half(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> World:
    return world_of("llama", torch.bfloat16, device, tmp_path_factory.mktemp("half"))


def mixed() -> list[RowPart]:
    """A chunk, a tree, single tokens, with stacks and without."""
    return [
        RowPart(tokens(6, 1), 0, [3, 1], STACKS[1]),
        RowPart(tokens(4, 2), 0, [0, 2], STACKS[3], (-1, 0, 0, 1)),
        RowPart(tokens(1, 3), 0, [5]),
        RowPart(tokens(1, 4), 0, [7], STACKS[2]),
    ]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, atol=3e-4, rtol=1e-4)
        else:
            assert (mine - theirs).norm() < 0.04 * theirs.norm()


def logits_of(backend: Backend, loras: Sequence[LoraWeights], kv: KVCache) -> Tensor:
    """Of the mixed batch; its first row has a prompt of 9 tokens, of which these are 6."""
    batch = lay_out(loras, mixed(), range(12))
    rows = list(batch.rows)
    rows[0] = replace(rows[0], prompt=9)
    return backend.forward(replace(batch, rows=tuple(rows)), kv).logits_XV


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ("llama", "biases", "window", "dynamic")),
        *((name, torch.bfloat16) for name in ("biases", "int8", "int4")),
    ],
    ids=str,
)
def test_a_mixed_batch_equals_torch(
    name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    world = world_of(name, dtype, device, tmp_path)
    found = logits_of(world.backend, world.loras, world.cache())
    expected = logits_of(world.reference, world.reference_loras, world.cache(world.reference))
    assert_close([found], [expected], dtype)


def test_a_rows_bits_do_not_depend_on_company_tree_chunk_or_bucket(world: World) -> None:
    """A prompt at once and alone; then in pieces, one of them as a tree, among other rows."""
    stack, ids, pages = ((ALL, 0.5), (WIDE, 1.5)), tokens(12, 5), [9, 4, 6, 8]
    (alone,) = run(world.backend, world.loras, world.cache(), [RowPart(ids, 0, pages, stack)])
    alone, kv = alone.clone(), world.cache()
    others = [
        RowPart(tokens(20, 6), 0, list(range(20, 26)), ((ALL, 1.0),)),
        RowPart(tokens(1, 7), 0, [30]),
    ]
    wrong = tokens(3, 8)
    # The last 3 tokens as a tree: two siblings before the second, one before the third.
    tree = [ids[9], wrong[0], wrong[1], ids[10], wrong[2], ids[11]]
    parents, path = (-1, 0, 0, 0, 3, 3), [0, 3, 5]
    steps: list[tuple[list[RowPart], RowPart, list[int]]] = [
        ([], RowPart(ids[:5], 0, pages, stack), [0, 1, 2, 3, 4]),
        (others, RowPart(ids[5:6], 5, pages, stack), [0]),
        (others[1:], RowPart(ids[6:9], 6, pages, stack), [0, 1, 2]),
        (others[:1], RowPart(tree, 9, pages, stack, parents), path),
    ]
    done = 0
    for beside, mine, nodes in steps:
        found = run(world.backend, world.loras, kv, [*beside, mine])[-1]
        assert torch.equal(found[nodes], alone[done : done + len(nodes)])
        kv.move([Move(pages, [done + node for node in nodes], range(done, done + len(nodes)))])
        done += len(nodes)
    assert done == len(ids)


def test_only_the_wanted_tokens_get_results(half: World) -> None:
    batch = lay_out(half.loras, mixed(), range(12))
    every = half.backend.forward(batch, half.cache())
    logits_XV, hidden_XH = every.logits_XV.clone(), every.hidden_XH.clone()
    # Heads through lm_head ask for logits of states, each row with its LoRAs.
    assert torch.equal(half.backend.logits(hidden_XH, batch.lora), logits_XV)
    for outputs in ([], [0, 1, 7, 11]):
        found = half.backend.forward(replace(batch, outputs=outputs), half.cache())
        assert torch.equal(found.logits_XV, logits_XV[outputs])
        assert torch.equal(found.hidden_XH, hidden_XH[outputs])
        assert torch.equal(found.best_X, found.logits_XV.argmax(dim=-1).cpu())
        assert torch.equal(found.peaks_X, found.logits_XV.amax(dim=-1).cpu())


def test_what_one_row_breaks_stays_in_it(half: World) -> None:
    """A LoRA whose scale is too large for a float32."""
    sound = mixed()
    batch = [sound[0], RowPart(tokens(2, 9), 0, [40], ((ALL, 1e39),)), *sound[1:]]
    expected = [each.clone() for each in run(half.backend, half.loras, half.cache(), sound)]
    found = run(half.backend, half.loras, half.cache(), batch)
    assert not found[1].isfinite().all()
    for mine, theirs in zip([found[0], *found[2:]], expected, strict=True):
        assert torch.equal(mine, theirs)


def test_rows_of_lm_head(half: World) -> None:
    ids = random.Random(1).sample(range(200), 20)
    rows_NH = torch.empty(20, half.backend.shapes.hidden_size, dtype=half.backend.dtype)
    expected_NH = torch.empty(20, half.backend.shapes.hidden_size)
    half.backend.head_rows(ids, rows_NH)
    half.reference.head_rows(ids, expected_NH)
    assert torch.equal(rows_NH, expected_NH.to(rows_NH.dtype))


def test_replays_give_the_bits_of_launches_and_a_step_is_done_when_it_returns(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that runs late: other rows and adapters in the same graph, and adapters' memory
    is somebody else's right behind a step."""
    if device.type != "cpu":
        pytest.skip("a device that runs late is made up")
    world = world_of("llama", torch.bfloat16, device, tmp_path)
    late = LateDevice()
    monkeypatch.setattr(backend_module, "device_of", lambda _: late)
    other = world_of("llama", torch.bfloat16, device, tmp_path)
    plain, mine = world.cache(), other.cache()
    for step, stack in enumerate((STACKS[1], STACKS[2], ((ALL, -0.5),), ((ALL, 2.0),))):
        parts = [
            RowPart(tokens(1, step), step, [1]),
            RowPart(tokens(1, step + 9), step, [2], stack),
        ]
        expected = run(world.backend, world.loras, plain, parts)
        loras = [_copy(each) for each in world.loras]
        with launching(late.launch):
            found = run(other.backend, loras, mine, parts)
        for each in loras:
            _spoil(each)
        late.run()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert late.log.count("capture") >= 1
    assert late.log.count("upload") == late.log.count("download") == 4


def _copy(lora: LoraWeights) -> LoraWeights:
    def group(each: GroupLora) -> GroupLora:
        targets = tuple(replace(target, b_OR=target.b_OR.clone()) for target in each.targets)
        return GroupLora(each.a_RI.clone(), targets)

    embedding = lora.embedding
    if embedding is not None:
        own = {"a_RV": embedding.a_RV.clone(), "b_HR": embedding.b_HR.clone()}
        embedding = replace(embedding, **own)
    return LoraWeights({key: group(each) for key, each in lora.groups.items()}, embedding)


def _spoil(lora: LoraWeights) -> None:
    for group in lora.groups.values():
        group.a_RI.fill_(torch.nan)
        for target in group.targets:
            target.b_OR.fill_(torch.nan)
