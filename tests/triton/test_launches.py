"""What a step of Mistral-7B asks of the device: launches and copies, counted without one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorastack.config import GIB
from lorastack.errors import FailedPreconditionError
from lorastack.model.backends.triton.graphs import MAX_GRAPHS
from lorastack.model.backends.triton.inputs import BUCKETS, bucket_of
from lorastack.model.backends.triton.reserve import (
    CONTEXT_NBYTES,
    GRAPH_NBYTES,
    reserved_nbytes,
)
from lorastack.model.backends.triton.workspace import LoraMemory
from tests.helpers.launches import launching
from tests.helpers.mock_mistral import META, SHAPES, MockMistral, mock_heads, mock_lora


class Launches:
    """Counts them by kernel."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()

    def __call__(self, kernel: Any, grid: Any, *args: object, **settings: object) -> None:
        self.kernels[kernel.fn.__name__] += 1

    @property
    def total(self) -> int:
        return self.kernels.total()


class Copies(TorchDispatchMode):
    """Notes what torch copies between host and device beside the backend's own two calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        plain = torch.tensor

        def noted(*args: Any, **kwargs: Any) -> torch.Tensor:  # what torch does not dispatch
            made = plain(*args, **kwargs)
            self.names += ["tensor"] if made.is_meta else []
            return made

        monkeypatch.setattr(torch, "tensor", noted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        values = tree_leaves((args, kwargs, result))
        if len({each.device for each in values if isinstance(each, torch.Tensor)}) > 1:
            self.names.append(func.overloadpacket.__name__)
        return result


@pytest.fixture(scope="module")
def mistral() -> MockMistral:
    return MockMistral()


@pytest.fixture
def launches() -> Iterator[Launches]:
    counted = Launches()
    with launching(counted):
        yield counted


def test_a_step_takes_few_launches(mistral: MockMistral, launches: Launches) -> None:
    mistral.backend.forward(mistral.step(8), mistral.kv)
    assert 320 <= launches.total <= 350
    plain = launches.total
    launches.kernels.clear()
    loras = [mock_lora(16) for _ in range(8)]
    mistral.backend.forward(mistral.step(8, loras), mistral.kv)
    assert plain + 8 * 32 <= launches.total <= 650


def test_a_step_of_known_kind_is_one_replay(mistral: MockMistral, launches: Launches) -> None:
    mistral = MockMistral()
    loras = [mock_lora(rank) for rank in (8, 16, 32, 8, 16)]
    for index in range(3):
        mistral.backend.forward(mistral.step(5 + index, loras[index:]), mistral.kv)
    counted = launches.total
    assert mistral.device.replays == 1
    for nodes in (1, 2):
        mistral.backend.forward(mistral.step(8 // nodes, loras[:2], nodes), mistral.kv)
    assert mistral.device.replays == 3 and launches.total == counted


@pytest.mark.usefixtures("launches")
def test_steps_of_few_tokens_are_graphs_before_the_first_row() -> None:
    mistral = MockMistral()
    mistral.backend.prepare(mistral.kv)
    replays = mistral.device.replays
    assert replays == 2 * 9  # buckets up to 64, with LoRAs and without
    loras = [mock_lora(16) for _ in range(3)]
    for batch in (
        mistral.step(3),
        mistral.step(64),
        mistral.step(3, loras),
        mistral.step(8, loras, 8),
    ):
        mistral.backend.forward(batch, mistral.kv)
        replays += 1
        assert mistral.device.replays == replays


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError("Python.h: No such file"), "Python.h: No such file; --backend torch"),
        (torch.OutOfMemoryError("out of memory"), "out of memory; give --kv-memory less"),
    ],
)
def test_kernels_that_do_not_run_are_told_at_the_start(error: Exception, remedy: str) -> None:
    mistral = MockMistral()

    def fail(*args: object, **settings: object) -> None:
        raise error

    with launching(fail), pytest.raises(FailedPreconditionError, match=remedy):
        mistral.backend.prepare(mistral.kv)


def test_a_graphs_memory_stays_when_more_is_asked_for() -> None:
    """A graph knows addresses and keeps no tensor."""
    memory = LoraMemory(SHAPES, META)
    for make, sizes in ((memory.logit_deltas, (8, 16)), (memory.shrunk, (1 << 14, 1 << 16))):
        first = make(sizes[0])
        made, address = weakref.ref(first), first.untyped_storage()._cdata
        del first
        make(sizes[1])
        assert made() is not None
        assert make(sizes[0]).untyped_storage()._cdata == address


def test_steps_beyond_the_last_bucket_take_memory_a_few_times() -> None:
    sizes = [bucket_of(num_tokens) for num_tokens in range(1, 5000)]
    assert all(size >= number for number, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [*BUCKETS, 640, 1280, 2560, 5120]


def test_memory_of_steps_is_counted_before_it_is_taken(mistral: MockMistral) -> None:
    backend = mistral.backend
    counted = reserved_nbytes(backend.shapes, backend.dtype, None)
    memory, model = backend._memory.of(64), backend._model
    attention = backend._steps_of(mistral.kv).of(1)[0].attention
    tensors = [getattr(memory, each.name) for each in fields(memory)]
    tensors += [model.cos_PF, model.sin_PF, attention.sums, attention.softmax]
    tensors.append(backend._lora_memory.logit_deltas(len(memory.hidden_TH)))
    taken = sum(each.nbytes for each in tensors)
    assert taken + CONTEXT_NBYTES + MAX_GRAPHS * GRAPH_NBYTES < counted < 2 * GIB


@pytest.mark.usefixtures("launches")
@pytest.mark.parametrize("drafting", [False, True])
def test_a_step_takes_one_copy_in_and_one_back(
    mistral: MockMistral, drafting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with adapters, trees and heads of their own, also at an adapter's first step."""
    heads = mock_heads(4, 4096) if drafting else None
    known = [mock_lora(16) for _ in range(8)]
    mistral.backend.forward(mistral.step(8, known, 8, heads), mistral.kv)
    loras = [mock_lora(16) for _ in range(8)]
    for lora in loras:
        mistral.backend.adopt(lora)
    mistral.device.copies.clear()
    with Copies(monkeypatch) as copies:
        outputs = mistral.backend.forward(mistral.step(8, loras, 8, heads), mistral.kv)
    assert mistral.device.copies == ["upload", "download", "wait"]
    assert copies.names == []
    assert len(outputs.accepted) == 8 and outputs.moved
    assert len(outputs.drafted) == (8 if drafting else 0)
    assert outputs.logits_XV.shape == (64, 32000) and outputs.logits_XV.device.type == "meta"


@pytest.mark.usefixtures("launches")
def test_other_work_is_done_between_the_last_call_and_the_wait(mistral: MockMistral) -> None:
    """Heads included. On CPU tensors nobody calls for it: there is nothing to wait for."""
    batch = mistral.step(8, (), 8, mock_heads(4, 4096))
    log = mistral.device.copies
    log.clear()
    launched: list[int] = []
    with launching(lambda *args, **settings: launched.append(len(log))):
        mistral.backend.forward(batch, mistral.kv, lambda: log.append("meanwhile"))
    assert log == ["upload", "download", "meanwhile", "wait"]
    assert set(launched) == {1}
    assert mistral.backend.overlaps


def test_a_copy_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Copies(monkeypatch) as copies:
        torch.tensor([1.0], device="meta")
        torch.ones(1).to("meta")
    assert copies.names == ["tensor", "_to_copy"]
