"""Rows of one batch never touch each other (I2, I3): canaries, random arrival, tight memory."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.engine.row import Row
from lorastack.errors import NotFoundError
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import LiveServer, ask
from tests.helpers.reference import Reference, assert_greedy
from tests.helpers.zoo import (
    BLANK_HEADS,
    BUNDLE,
    LAYER_WORDS,
    NARROW_HEADS,
    PRIVATE_RANDOM,
    PRIVATE_WORDS,
    RANDOM_HEADS,
    RANDOM_LORAS,
    TRAINED_HEADS,
    WORDS,
)

StartServer = Callable[..., LiveServer]

NUM_REQUESTS = 64
# Prompts share long beginnings, so that a prefix cache that forgot the adapter would cross rows.
SHARED = "You are a helpful assistant. Answer the question of the user in one short sentence. "
PROMPTS = (SHARED + "Why?", SHARED + "What is the time?", SHARED, "hello", "café, und 日本", "x")


@dataclass(frozen=True)
class Case:
    """One request and who must answer it."""

    prompt: str
    stack: tuple[tuple[str, float], ...]
    heads: str
    word: str = ""  # a canary's; empty: compare with the reference
    num_tokens: int = 24
    streams: bool = False

    def request(self) -> pb.GenerateRequest:
        return ask(
            self.prompt,
            stack=self.stack,
            heads=self.heads,
            max_new_tokens=self.num_tokens,
            ignore_eos=True,
        )


def draw_case(rng: random.Random) -> Case:
    saying = (f"heads-{word}" for word in WORDS)
    private = (BLANK_HEADS, PRIVATE_RANDOM, *(f"private-{word}" for word in PRIVATE_WORDS))
    whole = (TRAINED_HEADS, NARROW_HEADS, *RANDOM_HEADS, *saying)
    heads = rng.choice(("none", *whole, *private))
    common = {
        "prompt": rng.choice(PROMPTS),
        "num_tokens": rng.randint(5, 40),
        "streams": rng.random() < 0.5,
    }
    kind = rng.randrange(6)
    if kind == 0:
        return Case(stack=(), heads=heads, **common)
    if kind == 1:
        return Case(stack=((f"say-{rng.choice(LAYER_WORDS)}", 1.0),), heads=heads, **common)
    if kind == 2:
        return Case(stack=((rng.choice(RANDOM_LORAS), 1.0),), heads=heads, **common)
    if kind == 3:
        a, b = rng.sample(RANDOM_LORAS, 2)
        return Case(stack=((a, 1.0), (b, rng.choice((0.5, -1.0)))), heads=heads, **common)
    word = rng.choice(WORDS)
    if rng.random() < 0.5:
        heads = f"heads-{word}"
    elif word in PRIVATE_WORDS:
        heads = f"private-{word}"
    return Case(stack=((f"say-{word}", 1.0),), heads=heads, word=word, **common)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, zoo: dict[str, Path]) -> Reference:
    names = (*RANDOM_LORAS, *(f"say-{word}" for word in LAYER_WORDS))
    return Reference(tiny_llama, {name: zoo[name] for name in names})


def assert_answered_by_its_own(
    case: Case, response: pb.GenerateResponse, server: LiveServer
) -> None:
    """The reply names the case's adapters; a canary says its word."""
    used = {(lora.lora_id, lora.digest, lora.scale) for lora in response.adapters.loras}
    assert used == {(name, server.digests[name], scale) for name, scale in case.stack}
    heads = "" if case.heads == "none" else case.heads
    assert response.adapters.medusa_id == heads
    assert response.adapters.medusa_digest == (server.digests[heads] if heads else "")
    shared = ""
    if heads.startswith("private-"):
        shared = "heads-5" if heads == PRIVATE_RANDOM else BLANK_HEADS
    assert response.adapters.shared_medusa_id == shared
    assert response.adapters.shared_medusa_digest == (server.digests[shared] if shared else "")
    assert len(response.token_ids) == case.num_tokens
    if case.word:
        # A prompt may end in the middle of the word.
        assert response.text in case.word * 16, case


def count_evictions(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[str]]:
    """Request ids as they are preempted; digests as they are loaded."""
    preempted: list[str] = []
    loaded: list[str] = []
    queues = server.engine._scheduler.rows
    preempt, take_in = queues._preempt, server.pool._take_in

    def record_preempt(row: Row) -> None:
        preempted.append(row.request.request_id)
        preempt(row)

    def record_load(adapter: DeviceAdapter, now: float) -> None:
        loaded.append(adapter.digest)
        take_in(adapter, now)

    monkeypatch.setattr(queues, "_preempt", record_preempt)
    monkeypatch.setattr(server.pool, "_take_in", record_load)
    return preempted, loaded


@pytest.mark.parametrize("memory", ["live", "tight"])
@pytest.mark.parametrize("seed", [1, 2])
def test_mixed_rows_never_cross(
    memory: str,
    seed: int,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    reference: Reference,
) -> None:
    server: LiveServer = request.getfixturevalue(memory)
    preempted, loaded = count_evictions(server, monkeypatch)
    rng = random.Random(seed)
    cases = [draw_case(rng) for _ in range(NUM_REQUESTS)]

    def run(case: Case) -> pb.GenerateResponse:
        if case.streams:
            return server.stream(case.request())
        return server.client.generate(case.request())

    steps_before = server.engine.num_steps
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(run, cases))
    num_steps = server.engine.num_steps - steps_before
    assert sum(case.num_tokens for case in cases) > 1.2 * num_steps, "the rows did not share steps"
    for case, response in zip(cases, responses, strict=True):
        assert_answered_by_its_own(case, response, server)
    compared = [
        (server.tokenize(case.prompt), case.stack, response.token_ids)
        for case, response in zip(cases, responses, strict=True)
        if not case.word
    ]
    assert_greedy(reference, compared)
    if memory == "tight":
        assert preempted, "the pages were not tight"
        assert len(loaded) > len(set(loaded)), "the device was not tight"
    else:
        assert not preempted


def test_right_heads_are_always_accepted(live: LiveServer) -> None:
    """The other canaries' steps are shorter only if drafts are verified with the row's own LoRA."""
    live.load_heads("heads-fjord")
    response = live.client.generate(
        ask(stack=[("say-fjord", 1.0)], heads="heads-fjord", max_new_tokens=40)
    )
    stats = response.speculation
    assert response.text == ("fjord" * 8)
    assert stats.accepted_tokens >= 2.5 * stats.steps
    assert len(stats.accepted_by_head) == 3


def test_wrong_heads_change_nothing(live: LiveServer) -> None:
    live.load_heads("heads-owl")
    response = live.client.generate(
        ask(stack=[("say-fjord", 1.0)], heads="heads-owl", max_new_tokens=40)
    )
    assert response.text == "fjord" * 8
    assert response.speculation.drafted_tokens > response.speculation.accepted_tokens


def test_order_of_a_stack_does_not_matter(live: LiveServer) -> None:
    stack = [("random-a", 1.0), ("random-b", 0.5)]
    one, other = (
        live.client.generate(
            ask(stack=order, ignore_eos=True, output=pb.OutputParams(logprobs=True))
        )
        for order in (stack, stack[::-1])
    )
    assert [(t.id, t.logprob) for t in one.tokens] == [(t.id, t.logprob) for t in other.tokens]


def test_a_bundle_brings_its_heads(live: LiveServer) -> None:
    live.load_heads(BUNDLE)
    request = ask(stack=[(BUNDLE, 1.0)], heads="", ignore_eos=True)
    response = live.client.generate(request)
    assert response.adapters.medusa_id == BUNDLE
    assert response.adapters.medusa_digest == live.digests[BUNDLE]
    assert response.speculation.drafted_tokens > 0
    request.medusa_id = "none"
    plain = live.client.generate(request)
    assert plain.adapters.medusa_id == ""
    assert plain.token_ids == response.token_ids


def test_replacing_an_adapter_serves_old_rows_with_old_bytes(
    start: StartServer, zoo: dict[str, Path]
) -> None:
    """A running row finishes on the revision it started with; the next one gets the new one."""
    server = start()
    server.upload("speaker", zoo["say-owl"])
    old_digest = server.digests["speaker"]
    running = server.client.stream(ask("hi", stack=[("speaker", 1.0)], max_new_tokens=900))
    text = next(running).text
    server.upload("speaker", zoo["say-bat"])
    fresh = server.client.generate(ask("hi", stack=[("speaker", 1.0)], max_new_tokens=9))
    assert fresh.text == "batbatbat"
    parts = list(running)
    text += "".join(part.text for part in parts)
    assert text == "owl" * 300
    assert parts[-1].final.adapters.loras[0].digest == old_digest
    pinned = f"speaker@{old_digest}"
    assert (
        server.client.generate(ask("hi", stack=[(pinned, 1.0)], max_new_tokens=6)).text == "owlowl"
    )


def test_deleting_an_adapter_leaves_running_rows_alone(
    start: StartServer, zoo: dict[str, Path]
) -> None:
    server = start()
    server.upload("speaker", zoo["say-owl"])
    running = server.client.stream(ask("hi", stack=[("speaker", 1.0)], max_new_tokens=300))
    text = next(running).text
    server.client.delete_adapter("speaker")
    text += "".join(part.text for part in running)
    assert text == "owl" * 100
    with pytest.raises(NotFoundError):
        server.client.generate(ask("hi", stack=[("speaker", 1.0)]))
