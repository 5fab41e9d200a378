"""A model cut into shards: its parts, the order of its sums, and the processes that hold them.

Most tests run the shards as threads of this process, with gloo between them as between processes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from lorastack.errors import DeviceLostError, InvalidArgumentError
from lorastack.kernels.linear import linear, pack_dense, plain_weight
from lorastack.kernels.ops import Ops
from lorastack.kernels.quantize import Kind
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, AdapterLayout
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model import checkpoint as checkpoint_module
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.backends.parallel import backend as parallel_module
from lorastack.model.backends.parallel import crew as crew_module
from lorastack.model.backends.parallel.backend import ParallelBackend
from lorastack.model.backends.parallel.checkpoint import CheckpointShard
from lorastack.model.backends.parallel.group import Group
from lorastack.model.backends.parallel.orders import Setup
from lorastack.model.backends.parallel.sharded import ShardedBackend, load_shard
from lorastack.model.backends.parallel.shards import Shard, check_shards, shard_lora
from lorastack.model.backends.torch import O, TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import load_config
from lorastack.model.context import ForwardBatch, RowSpan
from lorastack.model.kv import Move
from tests.helpers.adapters import write_lora
from tests.helpers.live import PATIENCE, wait_until
from tests.helpers.native import RowPart, lay_out
from tests.helpers.packed import read_packed
from tests.helpers.tiny import build_llama, build_mistral, shapes_of

CPU = torch.device("cpu")
TARGETS = (*LAYER_TARGETS, EMBED, LM_HEAD)
CLOSE = {"atol": 2e-4, "rtol": 1e-4}  # sums in another order
MODELS: dict[str, dict[str, Any]] = {
    "tied, biases": {"attention_bias": True, "mlp_bias": True},
    "untied, grouped": {"tie_word_embeddings": False, "num_attention_heads": 8},
    "mistral": {"mistral": True},
}
Result = TypeVar("Result")


def on_shards(count: int, work: Callable[[Group], Result]) -> list[Result]:
    """What `work` gives on each shard, a thread each."""
    store = HashStore()
    with ThreadPoolExecutor(count) as pool:
        return list(
            pool.map(lambda shard: work(Group(shard, CPU, store, 60.0)), Shard(0, count).all)
        )


def build(folder: Path, *, mistral: bool = False, **overrides: Any) -> Path:
    fields = {"num_key_value_heads": 4} | overrides
    return (build_mistral if mistral else build_llama)(folder, **fields)


def sharded(folder: Path, group: Group, dtype: torch.dtype = torch.float32) -> ShardedBackend:
    setup = Setup(
        shard=group.shard,
        folder=folder,
        config=load_config(folder, None),
        device=CPU,
        dtype=dtype,
        threads=1,
        timeout=60.0,
    )
    part = CheckpointShard(Checkpoint(folder), group.shard)
    return ShardedBackend(setup, load_shard(part, setup), Ops(), group)


def one_process(folder: Path) -> Backend:
    return load_backend(folder, device=CPU, dtype=torch.float32, max_context=None, native=False)


def packed_lora(folder: Path, model: Path, seed: int) -> tuple[AdapterLayout, Tensor]:
    """Of rank `seed`."""
    shapes = shapes_of(model)
    written = write_lora(folder / f"lora-{seed}", shapes, seed=seed, rank=seed, targets=TARGETS)
    return read_packed(written, shapes)


def lora_of(folder: Path, model: Path, seed: int) -> LoraWeights:
    layout, buffer = packed_lora(folder, model, seed)
    return LoraWeights.from_buffer(buffer, layout)


def handed_over(backend: ParallelBackend, folder: Path, model: Path, seed: int) -> LoraWeights:
    """A LoRA that all shards hold."""
    layout, buffer = packed_lora(folder, model, seed)
    event = backend.loras.hand_over(f"{seed}", buffer, layout)
    wait_until(event.done, "all shards hold the LoRA")
    buffer = buffer.to(backend.device)
    return LoraWeights.from_buffer(buffer, layout, f"{seed}")


# -- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_lie_side_by_side_and_differ_by_one_at_most(count: int) -> None:
    for size in (count, 281, 96):
        parts = [range(size)[shard.part(size)] for shard in Shard(0, count).all]
        assert [place for part in parts for place in part] == list(range(size))
        lengths = [shard.length(size) for shard in Shard(0, count).all]
        assert lengths == [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"num_key_value_heads": 2}, None, "num_key_value_heads, 2: give a number that does"),
        ({"intermediate_size": 90}, None, "intermediate_size, 90: give a number that does"),
        ({}, Kind.INT8, "--tensor-parallel 4 does not go with --quantize"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    tmp_path: Path, fields: dict[str, int], kind: Kind | None, words: str
) -> None:
    shapes = shapes_of(build(tmp_path, **fields))
    with pytest.raises(InvalidArgumentError, match=words):
        check_shards(shapes, 4, kind)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_shards_read_their_parts_and_no_more(tmp_path: Path, name: str, count: int) -> None:
    """The parts of a tensor, put together, are the tensor; a bias of a sum is one shard's."""
    whole = Checkpoint(build(tmp_path, **MODELS[name]))
    parts = [CheckpointShard(whole, shard) for shard in Shard(0, count).all]
    sizes = [0] * count
    for tensor, entry in whole.tensors.items():
        expected = torch.empty(entry.shape)
        whole.read_into(tensor, expected)
        got = [torch.full(part.tensors[tensor].shape, torch.nan) for part in parts]
        for index, (part, out) in enumerate(zip(parts, got, strict=True)):
            counts: list[int] = []
            part.reporting(lambda done, total, counts=counts: counts.append(done)).read_into(
                tensor, out
            )
            sizes[index] += counts[-1] if counts else 0
        if tensor.endswith(("o_proj.weight", "down_proj.weight")):
            assert torch.equal(torch.cat(got, dim=1), expected)
        elif tensor.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(got[0], expected)
            assert all(not each.any() for each in got[1:])
        elif "norm" in tensor:
            assert all(torch.equal(each, expected) for each in got)
        else:
            assert torch.equal(torch.cat(got), expected)
            assert len(got[0]) < len(expected)
    assert sizes == [part.nbytes for part in parts]
    assert max(sizes) < whole.nbytes / count * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [4, 96, 100, 4 << 20])
def test_columns_are_read_to_any_dtype_in_any_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    whole = Checkpoint(build(tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = torch.empty(whole.tensors[name].shape)
    whole.read_into(name, expected)
    monkeypatch.setattr(checkpoint_module, "PIECE", piece)
    out = torch.empty(expected.shape[0], expected.shape[1] // 2, dtype=dtype)
    CheckpointShard(whole, Shard(1, 2)).read_into(name, out)
    assert torch.equal(out, expected.chunk(2, dim=1)[1].to(dtype))


# -- sums ---------------------------------------------------------------------------------------


def test_sums_are_in_the_order_of_the_shards_whatever_is_beside_a_value() -> None:
    parts = [torch.randn(500, 64) * 10**shard for shard in range(3)]
    expected = (parts[0] + parts[1]) + parts[2]
    assert not torch.equal(expected, parts[0] + (parts[1] + parts[2]))
    rows = (slice(None), slice(17, 18), slice(480, 500))

    def sums(group: Group) -> list[Tensor]:
        return [group.sum(parts[group.shard.index][each]) for each in rows]

    for results in on_shards(3, sums):
        for each, result in zip(rows, results, strict=True):
            assert torch.equal(result, expected[each])


def test_sums_of_bfloat16_are_rounded_once() -> None:
    parts = [torch.randn(8, 4).bfloat16() for _ in range(4)]
    expected = ((parts[0].float() + parts[1].float()) + parts[2].float()) + parts[3].float()
    for result in on_shards(4, lambda group: group.sum(parts[group.shard.index])):
        assert torch.equal(result, expected.bfloat16())


def test_a_projection_back_is_the_sum_of_its_shards_parts(tmp_path: Path) -> None:
    """The order of `sharded`, step by step: hidden + (part 0 + part 1), LoRAs within the parts."""
    folder = build(tmp_path / "model", attention_bias=True)
    loras = [lora_of(tmp_path, folder, seed) for seed in (3, 5)]
    decoder = one_process(folder)
    assert isinstance(decoder, TorchBackend)
    weights = decoder._weights.layers[1].o
    weight_OI, bias_O = plain_weight(weights), weights.bias
    assert bias_O is not None
    hidden_TH, x_TI = torch.randn(6, 64), torch.randn(6, weight_OI.shape[1])
    halves, expected = x_TI.chunk(2, dim=1), []
    for index, (part_TI, part_OI) in enumerate(zip(halves, weight_OI.chunk(2, dim=1), strict=True)):
        dense = pack_dense(part_OI.contiguous(), bias_O if index == 0 else torch.zeros_like(bias_O))
        part_TH = linear(part_TI.contiguous(), dense)
        for lora in loras:
            group = lora.groups[1, O]
            shrunk_TR = part_TI @ group.a_RI.chunk(2, dim=1)[index].t()
            part_TH.addmm_(shrunk_TR, group.targets[0].b_OR.t(), alpha=2 * group.targets[0].scale)
        expected.append(part_TH)

    def add(group: Group) -> Tensor:
        backend, out_TH = sharded(folder, group), hidden_TH.clone()
        batch = LoraBatch(
            tuple(Segment(0, 6, shard_lora(lora, group.shard), 2.0) for lora in loras)
        )
        part_TI = halves[group.shard.index].contiguous()
        backend._add_dense(out_TH, part_TI, backend._weights.layers[1].o, batch, 1, O)
        return out_TH

    for result in on_shards(2, add):
        assert torch.equal(result, hidden_TH + (expected[0] + expected[1]))


# -- steps --------------------------------------------------------------------------------------


def parts_of(model: Path) -> list[list[RowPart]]:
    """Two steps: prompts with stacks beside base rows; then a tree, a chunk and single tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(4, shapes_of(model).vocab_size, (count,), generator=generator).tolist()

    pages = [range(start, start + 16) for start in (0, 16, 32, 48)]
    stack, one, none = ((0, 1.0), (1, -0.5)), ((1, 2.0),), ()
    first = [
        RowPart(ids(9), 0, pages[0], stack),
        RowPart(ids(30), 0, pages[1], none),
        RowPart(ids(1), 0, pages[2], one),
    ]
    second = [
        RowPart(ids(5), 9, pages[0], stack, parents=(-1, 0, 0, 1, 2)),
        RowPart(ids(1), 30, pages[1], none),
        RowPart(ids(12), 1, pages[2], one),
        RowPart(ids(3), 0, pages[3], stack),
    ]
    return [first, second]


def steps(backend: Backend, model: Path, loras: list[LoraWeights]) -> list[Tensor]:
    """Logits of both steps, the tree's path being moved into its place behind the first."""
    kv = backend.make_kv(64, 4)
    batches = [
        lay_out(loras, parts, range(sum(len(part.ids) for part in parts)))
        for parts in parts_of(model)
    ]
    results = [backend.forward(batches[0], kv), backend.forward(batches[1], kv)]
    kv.move([Move(range(16), (9 + 2, 9 + 4), (9 + 1, 9 + 2))])
    after = lay_out(loras, [RowPart([7, 8], 9 + 3, range(16), ((0, 1.0),))], [1])
    results.append(backend.forward(after, kv))
    states = results[-1].hidden_XH.expand(3, -1)
    lora = LoraBatch((Segment(1, 3, loras[1], 1.0),))
    return [*(each.logits_XV for each in results), backend.logits(states, lora)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_shards_together_give_the_logits_of_one_process(
    tmp_path: Path, name: str, count: int
) -> None:
    folder = build(tmp_path / "model", **MODELS[name])
    loras = [lora_of(tmp_path, folder, seed) for seed in (4, 7)]
    expected = steps(one_process(folder), folder, loras)

    def run(group: Group) -> list[Tensor]:
        own = [shard_lora(lora, group.shard) for lora in loras]
        with torch.inference_mode():
            return steps(sharded(folder, group), folder, own)

    first, *_ = on_shards(count, run)
    for got, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)


def test_shards_in_bfloat16_give_float32_logits_near_one_process(tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    batch = lay_out([], parts_of(folder)[0][1:2], range(30))

    def run(group: Group) -> Tensor:
        backend = sharded(folder, group, torch.bfloat16)
        return backend.forward(batch, backend.make_kv(64, 4)).logits_XV

    plain = one_process(folder)
    expected = plain.forward(batch, plain.make_kv(64, 4)).logits_XV
    first, _ = on_shards(2, run)
    assert first.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(first, expected).min() > 0.99


# -- processes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("parallel") / "model")


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[ParallelBackend]:
    backend = load_backend(folder, device=CPU, dtype=None, max_context=None, shards=2)
    assert isinstance(backend, ParallelBackend)
    yield backend
    backend.crew.close()


def test_two_processes_give_the_logits_of_one(
    tmp_path: Path, folder: Path, two: ParallelBackend
) -> None:
    """LoRAs come and go between steps."""
    assert (two.name, two.dtype, two.shapes) == ("torch x2", torch.float32, shapes_of(folder))
    plain = one_process(folder)
    for seeds in ((4, 7), (5, 6)):
        loras = [handed_over(two, tmp_path, folder, seed) for seed in seeds]
        for got, wanted in zip(steps(two, folder, loras), steps(plain, folder, loras), strict=True):
            torch.testing.assert_close(got, wanted, **CLOSE)
        for seed in seeds:
            two.loras.take_back(f"{seed}")


def test_the_file_by_which_shards_find_each_other_stays_and_is_theirs_alone(
    two: ParallelBackend,
) -> None:
    """NCCL asks it for news of failures again and again."""
    files = {Path(f"/proc/{pid}/fd/{two.crew.store}") for pid in (os.getpid(), *two.crew.pids)}
    assert len({file.stat().st_ino for file in files}) == 1
    assert all(os.readlink(file).startswith("/memfd:lorastack-shards") for file in files)


def test_a_step_waits_for_no_hand_over(tmp_path: Path, folder: Path, two: ParallelBackend) -> None:
    """The thread that hands over is held up, and steps go on, with what was handed over before."""
    plain = one_process(folder)
    loras = [handed_over(two, tmp_path, folder, seed) for seed in (4, 7)]
    goes_on = threading.Event()
    held_up = two.crew.aside(lambda: None if goes_on.wait(PATIENCE) else pytest.fail("held up"))
    layout, buffer = packed_lora(tmp_path, folder, 5)
    event = two.loras.hand_over("5", buffer, layout)
    for got, wanted in zip(steps(two, folder, loras), steps(plain, folder, loras), strict=True):
        torch.testing.assert_close(got, wanted, **CLOSE)
    assert not event.done() and not held_up.done()
    goes_on.set()
    wait_until(event.done, "all shards hold the LoRA")
    for seed in (4, 7, 5):
        two.loras.take_back(f"{seed}")


def test_rows_of_lm_head_are_those_of_the_checkpoint(folder: Path, two: ParallelBackend) -> None:
    ids, rows_NH, expected_NH = (280, 3, 140), torch.empty(3, 64), torch.empty(3, 64)
    two.head_rows(ids, rows_NH)
    one_process(folder).head_rows(ids, expected_NH)
    assert torch.equal(rows_NH, expected_NH)


def test_each_shard_takes_a_device_and_a_share_of_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Setup] = []

    def refuse(setups: list[Setup]) -> None:
        started.extend(setups)
        raise DeviceLostError("none starts")

    monkeypatch.setattr(parallel_module, "Crew", refuse)
    whole = (Checkpoint(folder), load_config(folder, None))
    for device, expected in (("cuda", ["cuda:1", "cuda:2", "cuda:3"]), ("cpu", ["cpu"] * 3)):
        started.clear()
        with pytest.raises(DeviceLostError):
            ParallelBackend.load(*whole, torch.device(device), torch.float32, Ops(), 4)
        assert [str(setup.device) for setup in started] == expected
        assert [setup.shard for setup in started] == Shard(0, 4).all[1:]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_logits_of_one_process(tmp_path: Path, folder: Path) -> None:
    cuda = torch.device("cuda")
    backend = load_backend(folder, device=cuda, dtype=torch.float32, max_context=None, shards=2)
    assert isinstance(backend, ParallelBackend)
    loras = [lora_of(tmp_path, folder, seed) for seed in (4, 7)]
    try:
        on_device = [handed_over(backend, tmp_path, folder, seed) for seed in (4, 7)]
        for got, wanted in zip(
            steps(backend, folder, on_device),
            steps(one_process(folder), folder, loras),
            strict=True,
        ):
            torch.testing.assert_close(got.cpu(), wanted, **CLOSE)
    finally:
        backend.crew.close()


def test_a_shard_that_hangs_is_an_error_and_no_hang(
    two: ParallelBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of `two`."""
    monkeypatch.setattr(crew_module, "GRACE", 0.5)
    failures: list[BaseException] = []
    two.crew.watch(failures.append)
    kv = two.make_kv(4, 4)
    batch = ForwardBatch([5], (RowSpan(0, 1, [0], 0),), [0])
    two.forward(batch, kv)
    two._group._backend._set_default_timeout(timedelta(seconds=1))
    os.kill(two.crew.pids[0], signal.SIGSTOP)
    with pytest.raises(DeviceLostError, match="waited too long for another one"):
        two.forward(batch, kv)
    with pytest.raises(DeviceLostError, match="waited too long for another one"):
        kv.move([Move([0], [0], [1])])
    assert [type(failure) for failure in failures] == [DeviceLostError]
