"""A server whose model two processes share: the same tokens, and an end when one of them ends."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lorastack.client import Client
from lorastack.config import KIB, AdapterConfig
from lorastack.errors import InternalError, UnavailableError
from lorastack.model.backends.parallel.loras import Lender
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.adapters import write_lora
from tests.helpers.live import PATIENCE, ROOMY, LiveServer, ask, wait_until
from tests.helpers.reference import Reference, assert_greedy
from tests.helpers.tiny import shapes_of
from tests.helpers.zoo import FAMILIAR, LAYER_WORDS, RANDOM_LORAS, TRAINED_HEADS
from tests.system.test_isolation import Case, assert_answered_by_its_own, draw_case
from tests.system.test_process import Process

NUM_REQUESTS = 32
SHARED = ("--tensor-parallel", "2")
SAMPLINGS = (
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
    {"temperature": 0.9, "seed": 5, "typical_p": 0.9},
)


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    """Room for a few adapters only, so that they come and go on both shards."""
    adapters = AdapterConfig(
        store=tmp_path_factory.mktemp("two") / "store",
        device_memory=200 * KIB,
        host_memory=200 * KIB,
    )
    with LiveServer(tiny_llama, engine=ROOMY, adapters=adapters, tensor_parallel=2) as server:
        server.upload_all(zoo)
        yield server
        server.assert_idle()
        others = shards_of(os.getpid())
        assert len(others) == 1
    assert not any(process.is_running() for process in others)


def test_mixed_rows_are_answered_as_by_one_process(
    two: LiveServer, tiny_llama: Path, zoo: dict[str, Path]
) -> None:
    """LoRAs, stacks and heads of all kinds, canaries among them, in one batch."""
    info = two.client.model_info()
    assert (info.backend, info.dtype, info.device) == ("torch x2", "float32", "cpu")
    rng = random.Random(3)
    cases = [draw_case(rng) for _ in range(NUM_REQUESTS)]

    def run(case: Case) -> pb.GenerateResponse:
        request = case.request()
        return two.stream(request) if case.streams else two.client.generate(request)

    evictions = two.pool.stats().evictions
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(run, cases))
    assert two.pool.stats().evictions > evictions
    assert sum(response.speculation.accepted_tokens for response in responses) > 0
    for case, response in zip(cases, responses, strict=True):
        assert_answered_by_its_own(case, response, two)
    names = (*RANDOM_LORAS, *(f"say-{word}" for word in LAYER_WORDS))
    reference = Reference(tiny_llama, {name: zoo[name] for name in names})
    compared = [
        (two.tokenize(case.prompt), case.stack, response.token_ids)
        for case, response in zip(cases, responses, strict=True)
        if not case.word
    ]
    assert_greedy(reference, compared)


def test_samples_are_the_same_alone_drafted_in_company_and_in_one_process(
    two: LiveServer, live: LiveServer
) -> None:
    cases = [
        (FAMILIAR[index], stack, sampling)
        for index, sampling in enumerate(SAMPLINGS)
        for stack in ((), (("random-a", 0.5), ("random-b", 1.0)))
    ]

    def run(server: LiveServer, case: int, *, drafts: bool) -> tuple[list[int], int]:
        prompt, stack, sampling = cases[case]
        reply = server.client.generate(
            ask(
                prompt,
                stack=stack,
                heads=TRAINED_HEADS if drafts else "none",
                off=not drafts,
                max_new_tokens=24,
                ignore_eos=True,
                sampling=sampling,
            )
        )
        return list(reply.token_ids), reply.speculation.accepted_tokens

    numbers = range(len(cases))
    alone = [run(two, case, drafts=False)[0] for case in numbers]
    two.load_heads(TRAINED_HEADS)
    with ThreadPoolExecutor(len(cases)) as pool:
        drafted = list(pool.map(lambda case: run(two, case, drafts=True), numbers))
        one_process = list(pool.map(lambda case: run(live, case, drafts=False)[0], numbers))
    assert [tokens for tokens, _ in drafted] == alone
    assert sum(accepted for _, accepted in drafted) > 0
    assert one_process == alone


def test_a_prompts_log_probabilities_and_a_grammar(two: LiveServer, live: LiveServer) -> None:
    """What asks for logits of many tokens, and what changes them on the host."""
    output = pb.OutputParams(prompt_logprobs=True, logprobs=True, top_logprobs=2)
    schema = pb.ResponseFormat(regex="[a-f]{12}")
    for request in (
        ask("The quick brown fox", stack=[("random-a", 1.0)], max_new_tokens=8, output=output),
        ask("hello", stack=[("random-c", 1.0)], max_new_tokens=16, response_format=schema),
    ):
        got, wanted = two.client.generate(request), live.client.generate(request)
        assert got.token_ids == wanted.token_ids
        logprobs = [
            [token.logprob for token in (*reply.prompt_tokens, *reply.tokens)]
            for reply in (got, wanted)
        ]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)


def test_rows_run_while_a_lora_is_handed_over(
    two: LiveServer, tiny_llama: Path, tmp_path: Path
) -> None:
    """The thread that hands over is held up: others begin and end, with a LoRA and without."""
    lender = two.pool._pipeline._others
    assert isinstance(lender, Lender)
    familiar = ask("hello", stack=[("random-a", 1.0)], max_new_tokens=16, ignore_eos=True)
    expected = two.client.generate(familiar).token_ids
    two.upload("late", write_lora(tmp_path / "late", shapes_of(tiny_llama), seed=31, rank=2))
    goes_on = threading.Event()
    lender._crew.aside(lambda: None if goes_on.wait(PATIENCE) else pytest.fail("held up"))
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(two.client.generate, ask("hello", stack=[("late", 1.0)]))
        try:
            handed = two.pool._pipeline._handed
            wait_until(lambda: two.digests["late"] in handed, "its LoRA is on its way")
            assert two.client.generate(familiar).token_ids == expected
            two.client.generate(ask("hello", max_new_tokens=16, ignore_eos=True))
            assert not late.done()
        finally:
            goes_on.set()
        assert late.result().adapters.loras[0].digest == two.digests["late"]


# -- ends ---------------------------------------------------------------------------------------


@pytest.fixture
def process(tmp_path: Path, tiny_llama: Path) -> Iterator[Process]:
    process = Process(tiny_llama, tmp_path / "store", *SHARED)
    yield process
    process.end()


def shards_of(pid: int) -> list[psutil.Process]:
    """The processes of the other shards of the server in a process."""
    return [
        child
        for child in psutil.Process(pid).children()
        if child.status() != psutil.STATUS_ZOMBIE
        and any("parallel.worker" in word for word in child.cmdline())
    ]


def test_a_killed_shard_ends_the_server_with_a_clear_error(process: Process) -> None:
    (shard,) = shards_of(process.pid)
    with Client(process.address) as client:
        running = client.stream(ask("hello", ignore_eos=True, max_new_tokens=8000))
        next(running)
        shard.kill()
        with pytest.raises((InternalError, UnavailableError)):
            list(running)
    code, errors = process.wait()
    assert code == 1
    assert f"shard 1 of 2 (process {shard.pid}) was killed by SIGKILL; the server ends" in errors


def test_no_shard_outlives_the_server(process: Process) -> None:
    (shard,) = shards_of(process.pid)
    with Client(process.address) as client:
        running = client.stream(ask("hello", ignore_eos=True, max_new_tokens=8000))
        next(running)
        process.signal(signal.SIGKILL)
        process.wait()  # until no process has the server's stderr any more
        wait_until(lambda: not shard.is_running(), "the shard has ended")
        with pytest.raises(UnavailableError):
            list(running)
