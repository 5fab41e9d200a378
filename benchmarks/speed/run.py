"""Rounds in which every engine that can run a case does, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import islice
from typing import TypeVar

import typer

from benchmarks.paging.traffic import Background
from benchmarks.peers.protocol import Done, Job
from benchmarks.speed import latency
from benchmarks.speed.cases import NEW_TOKENS, Case, Prompts
from benchmarks.speed.engines import Engine, Ours
from benchmarks.speed.peers import Peers
from benchmarks.speed.results import AUTO, BANDWIDTH, GAPS, MATHS, OFF, Results
from benchmarks.step import bandwidth

T = TypeVar("T")

TREES = (4, 8, 12, 16)
MATHS_TOKENS = 128
BANDWIDTH_READS = 5
WARM_TOKENS = 16
CHECK = Case(key="", name="first tokens", loras=((),) * 8, new_tokens=4)


class Run:
    """One benchmark. The first round warms up with few tokens; its results are dropped.

    sender, a process of low priority, measures rates; watcher, one of normal priority, gaps.
    """

    def __init__(
        self,
        server: str,
        sender: Background,
        watcher: Background,
        peers: Peers,
        prompts: Prompts,
    ) -> None:
        self._server, self._watcher = server, watcher
        self._off = Ours(server, sender, 0)
        self._ours: dict[str, Engine] = {OFF: self._off, AUTO: Ours(server, sender)}
        capped = {f"{AUTO} {nodes}": Ours(server, sender, nodes) for nodes in TREES}
        self._trees = {**self._ours, **capped}
        self._peers, self._prompts = peers, prompts
        self.results = Results()
        self.gaps: list[latency.Gaps] = []

    def check(self) -> None:
        """Leave out peers that run another model."""
        say(0, CHECK.name)
        job = self._prompts.job(CHECK)
        self._peers.check(job, self._off.generate(job).tokens)

    def round(self, cases: list[Case], parts: Collection[str], number: int) -> None:
        """parts: may name MATHS and GAPS. number: from 0; engines begin at another one in each."""
        for case in cases:
            say(number, case.name)
            if not case.is_prefill:  # a prefill is bound by arithmetic
                self.results.add(case.name, BANDWIDTH, bandwidth(BANDWIDTH_READS))
            job = self._prompts.job(case, WARM_TOKENS if number == 0 else NEW_TOKENS)
            able = [key for key, peer in self._peers.running.items() if case.fits(peer.about)]
            engines = self._ours if not case.is_prefill else {OFF: self._off}  # heads run after it
            for name, done in self._all(job, engines, able, case.name, number).items():
                rate = (
                    case.prompt_tokens / done.prompt_seconds
                    if case.is_prefill
                    else done.decode_tokens / done.decode_seconds
                )
                self.results.add(case.name, name, rate)
        if MATHS in parts:
            self._maths(number)
        if GAPS in parts and number:
            self._latency(number)
        if number == 0:
            self.results, self.gaps = Results(), []

    def _all(
        self, job: Job, ours: dict[str, Engine], peers: Iterable[str], part: str, number: int
    ) -> dict[str, Done]:
        """What every engine that does not fail makes of a job, one after the other."""
        where = f"{part}, round {number}"
        calls: dict[str, Callable[[], Done | None]] = {
            **{name: partial(engine.generate, job) for name, engine in ours.items()},
            **{key: partial(self._peers.generate, key, job, where) for key in peers},
        }
        results = {name: call() for name, call in rotated(calls, number).items()}
        return {name: done for name, done in results.items() if done is not None}

    def _maths(self, number: int) -> None:
        """One maths question as it comes, with trees as the server likes and with smaller ones."""
        say(number, MATHS)
        prompt = self._prompts.maths[number % len(self._prompts.maths)]
        job = Job([prompt], MATHS_TOKENS if number else WARM_TOKENS, [()])
        able = [key for key in self._peers.running if key == "llama_cpp"]
        for name, done in self._all(job, self._trees, able, MATHS, number).items():
            self.results.add(MATHS, name, done.decode_tokens / done.decode_seconds)

    def _latency(self, number: int) -> None:
        say(number, "gaps between tokens")
        rows = islice(self._prompts.maths, latency.ROWS)
        prompts = [self._prompts.filled(ids, len(ids)) for ids in rows]
        long_prompt = self._prompts.filled([], latency.LONG_PROMPT)
        self.gaps.append(latency.measure(self._watcher, self._server, prompts, long_prompt))

    def gap_ratios(self) -> dict[str, float]:
        """Medians over rounds: p99 and the stall, over the median gap. Empty if not measured."""
        if not self.gaps:
            return {}
        return {
            "p99": statistics.median(gaps.p99 / gaps.median for gaps in self.gaps),
            "stall": statistics.median(gaps.stall / gaps.median for gaps in self.gaps),
        }


def say(number: int, what: str) -> None:
    """Progress, on stderr."""
    typer.echo(f"round {number}: {what}", err=True)


def rotated(engines: dict[str, T], by: int) -> dict[str, T]:
    """The same in another order."""
    names = list(engines)
    by %= len(names)
    return {name: engines[name] for name in [*names[by:], *names[:by]]}
