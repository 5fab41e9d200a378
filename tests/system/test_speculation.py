"""Drafts never change a token: random requests of every kind, in company and alone, in float64.

A case is a request that runs alone without drafts, and then in a batch of others, most of them
drafted. In float64 no rounding decides anything, so there is no excuse. `make fuzz` runs 20,000.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import cast

import pytest

from lorastack.engine.row import Row
from lorastack.model.backends.base import Backend
from lorastack.request import FinishReason, Request, TokenSource
from tests.helpers.cases import Cases, build_bench, off, stopping
from tests.helpers.overlapping import OverlappingBackend
from tests.helpers.scripted import Bench, Output, Script
from tests.helpers.tiny import build_llama, build_mistral

TOLERANCE = 1e-9  # between log-probabilities
CUT_SHORT = (FinishReason.CANCELLED, FinishReason.TIME_LIMIT)
SMALL = {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Cases]:
    """Cases for a Llama, and for a Mistral with a sliding window whose steps overlap other work."""
    root = tmp_path_factory.mktemp("fuzz")
    llama = build_llama(root / "llama", head_dim=8, **SMALL)
    mistral = build_mistral(root / "mistral", num_layers=2, head_dim=12, **SMALL)
    benches = [build_bench(model, root / f"for-{model.name}") for model in (llama, mistral)]
    overlapping = cast(Backend, OverlappingBackend(benches[1].decoder))
    return [Cases(benches[0]), Cases(replace(benches[1], decoder=overlapping))]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the cases came to, so that none of it can quietly stop happening."""

    counts: Counter[str] = field(default_factory=Counter)
    ends: Counter[FinishReason] = field(default_factory=Counter)
    drafted: Counter[TokenSource] = field(default_factory=Counter)
    accepted: Counter[TokenSource] = field(default_factory=Counter)

    def add(self, request: Request, output: Output, script: Script) -> None:
        assert output.final is not None, output.error
        stats = output.final.speculation
        self.ends[output.final.finish_reason] += 1
        self.drafted.update(stats.drafted)
        self.accepted.update(stats.accepted)
        self.counts.update(
            steps=stats.steps,
            cached=output.final.cached_prompt_tokens > 0,
            in_chunks=len(request.prompt_ids) > script.max_step_tokens,
            stacked=len(request.loras) > 1,
            typical=request.typical is not None,
            deep=sum(stats.accepted_by_head[2:]),
        )


def compare(request: Request, alone: Output, output: Output) -> None:
    assert alone.final is not None and output.final is not None, (alone.error, output.error)
    stats = output.final.speculation
    assert stats.accepted <= stats.drafted
    assert sum(stats.accepted_by_head) == stats.accepted[TokenSource.HEADS]
    if request.typical is not None:
        assert len(output.tokens) <= request.stop.max_new_tokens
        return
    if output.final.finish_reason in CUT_SHORT:
        assert output.ids == alone.ids[: len(output.ids)]
    else:
        assert output.ids == alone.ids
        assert output.text == alone.text
        assert output.final.finish_reason == alone.final.finish_reason
        assert output.final.stop_match == alone.final.stop_match
    for token, expected in zip(output.tokens, alone.tokens, strict=False):
        assert (token.logprobs is None) == (request.num_logprobs is None)
        if token.logprobs is None or expected.logprobs is None:
            continue
        assert token.logprobs.logprob == pytest.approx(expected.logprobs.logprob, abs=TOLERANCE)
        top, expected_top = dict(token.logprobs.top), dict(expected.logprobs.top)
        assert top == pytest.approx(expected_top, abs=TOLERANCE)
        assert len(top) == request.num_logprobs


def run_batch(cases: Cases, seed: int, seen: Seen) -> int:
    """The number of its cases. All that happens follows from the seed."""
    chance = random.Random(seed)
    bench = cases.bench
    requests, alone = [], {}
    for number in range(chance.choice((1, 2, 4, 8, 16, 32))):
        request = cases.request(f"case {number}", chance)
        output = _run_alone(bench, request, chance)
        if output.text and chance.random() < 0.2:
            request = stopping(request, output.text, chance)
            output = _run_alone(bench, request, chance)
        requests.append(request)
        alone[request.request_id] = output
    script = _script(requests, alone, chance)
    outputs = bench.run(requests, script, chance)
    for request in requests:
        try:
            compare(request, alone[request.request_id], outputs[request.request_id])
        except AssertionError as error:
            error.add_note(f"{request} in {script}")
            raise
        seen.add(request, outputs[request.request_id], script)
    return len(requests)


def _run_alone(bench: Bench, request: Request, chance: random.Random) -> Output:
    return bench.run([off(request)], Script(num_pages=32), chance)[request.request_id]


def _script(requests: list[Request], alone: dict[str, Output], chance: random.Random) -> Script:
    """Cheap and dear tokens, little and much memory; now and then nothing is in the way."""
    page_size = chance.choice((4, 8, 16))
    longest = max(len(each.prompt_ids) + each.stop.max_new_tokens for each in requests)
    return Script(
        num_pages=-(-longest // page_size) + chance.choice((0, 4, 40, 400)),
        page_size=page_size,
        max_rows=chance.choice((3, 32, 32)),
        max_step_tokens=chance.choice((5, 24, 256)),
        answers={name: output.ids for name, output in alone.items()},
        token_seconds=chance.choice((0.0, 0.003, 0.01, 0.1)),
        heads_seconds=chance.choice((0.0, 0.01)),
        missing=chance.choice((0.0, 0.15)),
        parking=chance.choice((0.0, 0.05)),
        cancelling=chance.choice((0.0, 0.0, 0.005)),
        arriving=chance.choice((1, 5, 32)),
    )


@pytest.mark.timeout(0)  # `make fuzz` takes its time; a run that goes nowhere ends by itself
def test_drafts_change_no_token(
    kinds: list[Cases],
    pytestconfig: pytest.Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)  # some heads here must fail, and each failure logs an error
    seen = Seen()
    preempt = Row.preempt

    def counted(row: Row) -> None:
        seen.counts["preempted"] += 1
        preempt(row)

    monkeypatch.setattr(Row, "preempt", counted)
    num_cases, seed = 0, pytestconfig.getoption("--fuzz-seed")
    while num_cases < pytestconfig.getoption("--fuzz-cases"):
        try:
            num_cases += run_batch(kinds[seed % len(kinds)], seed, seen)
        except Exception as error:
            error.add_note(f"again: --fuzz-seed {seed} --fuzz-cases 1")
            raise
        seed += 1
    print(seen)  # shown when one of these is missing
    if num_cases < 400:  # one that failed, again
        return
    assert seen.ends.keys() == {*FinishReason}
    assert seen.accepted.keys() == {*TokenSource} - {TokenSource.MODEL}
    for source, count in seen.accepted.items():
        assert 20 < count < seen.drafted[source]
    assert 0.25 < seen.accepted.total() / seen.counts["steps"] < 0.75
    assert min(seen.counts.values()) > 20
