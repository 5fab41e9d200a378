"""Rounds in which every engine that can run a case does, one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from itertools import islice
from typing import TypeVar

import typer

from benchmarks.paging.traffic import Background
from benchmarks.peers.process import Peer
from benchmarks.peers.protocol import Job
from benchmarks.speed import latency
from benchmarks.speed.cases import Case, Prompts
from benchmarks.speed.engines import Engine, Ours
from benchmarks.speed.results import AUTO, BANDWIDTH, MATHS, OFF, Results
from benchmarks.step import bandwidth

T = TypeVar("T")

TREES = (4, 8, 12, 16)
MATHS_TOKENS = 128
BANDWIDTH_READS = 5


class Run:
    """One benchmark. Results of the first round, which warms up, are dropped.

    sender, a process of low priority, measures rates; watcher, one of normal priority, gaps.
    """

    def __init__(
        self,
        server: str,
        sender: Background,
        watcher: Background,
        peers: Mapping[str, Peer],
        prompts: Prompts,
    ) -> None:
        self._server, self._watcher = server, watcher
        self._off = Ours(server, sender, 0)
        self._trees = {f"{AUTO} {nodes}": Ours(server, sender, nodes) for nodes in TREES}
        self._auto = Ours(server, sender)
        self._peers, self._prompts = peers, prompts
        self.results = Results()
        self.gaps: list[latency.Gaps] = []

    def round(self, cases: list[Case], number: int) -> None:
        """number: from 0; engines begin at another one in each."""
        for case in cases:
            say(number, case.name)
            if not case.is_prefill:  # a prefill is bound by arithmetic
                self.results.add(case.name, BANDWIDTH, bandwidth(BANDWIDTH_READS))
            job = self._prompts.job(case)
            for name, engine in rotated(self._engines(case), number).items():
                done = engine.generate(job)
                rate = (
                    case.prompt_tokens / done.prompt_seconds
                    if case.is_prefill
                    else done.decode_tokens / done.decode_seconds
                )
                self.results.add(case.name, name, rate)
        self._maths(number)
        self._latency(number)
        if number == 0:
            self.results, self.gaps = Results(), []

    def _engines(self, case: Case) -> dict[str, Engine]:
        plain: dict[str, Engine] = {OFF: self._off}
        if not case.is_prefill:  # heads run after it
            plain[AUTO] = self._auto
        able = {name: peer for name, peer in self._peers.items() if case.fits(peer.mixed_loras)}
        return plain | able

    def _maths(self, number: int) -> None:
        """One maths question as it comes, with trees as the server likes and with smaller ones."""
        say(number, MATHS)
        prompt = self._prompts.maths[number % len(self._prompts.maths)]
        job = Job([prompt], MATHS_TOKENS, [()])
        engines: dict[str, Engine] = {OFF: self._off, AUTO: self._auto, **self._trees}
        engines |= {name: peer for name, peer in self._peers.items() if name == "llama_cpp"}
        for name, engine in rotated(engines, number).items():
            done = engine.generate(job)
            self.results.add(MATHS, name, done.decode_tokens / done.decode_seconds)

    def _latency(self, number: int) -> None:
        say(number, "gaps between tokens")
        rows = islice(self._prompts.maths, latency.ROWS)
        prompts = [self._prompts.filled(ids, len(ids)) for ids in rows]
        long_prompt = self._prompts.filled([], latency.LONG_PROMPT)
        self.gaps.append(latency.measure(self._watcher, self._server, prompts, long_prompt))

    def gap_ratios(self) -> dict[str, float]:
        """Medians over rounds: p99 and the stall, over the median gap."""
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
