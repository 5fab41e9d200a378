"""Sends requests and notes when their tokens arrive, for `lorastack bench` and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import pairwise

from lorastack.client import Client, GenerateRequest

CTRL_C_SECONDS = 0.2  # as often does a waiting thread look whether it was interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One streamed request; times are seconds of this process's monotonic clock.

    arrivals: (time, number of tokens) of every message with tokens; steps: decoding steps as the
    server counts them, without the prompt's.
    """

    sent: float
    arrivals: tuple[tuple[float, int], ...]
    steps: int

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def ended(self) -> float:
        """When the last message with tokens came."""
        return self.arrivals[-1][0]

    @property
    def tokens(self) -> int:
        """Tokens of the whole reply."""
        return sum(count for _, count in self.arrivals)

    @property
    def gaps(self) -> list[float]:
        """Seconds between messages with tokens; with heads, a message may bring several."""
        return [after - before for (before, _), (after, _) in pairwise(self.arrivals)]


def send(client: Client, requests: Sequence[GenerateRequest], concurrency: int) -> list[Outcome]:
    """Sends all requests, at most `concurrency` at a time; outcomes in their order.

    Every request must make a token. Raises what the client raises, once the others have ended.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            replies = [pool.submit(stream, client, request) for request in requests]
            return [_result(reply) for reply in replies]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                client.close()  # which ends the calls that the pool's threads wait for
            raise


def _result(reply: Future[Outcome]) -> Outcome:
    """Waits in short turns: a signal may come just before a wait begins, and does not end it."""
    while wait([reply], CTRL_C_SECONDS).not_done:
        pass
    return reply.result()


def stream(client: Client, request: GenerateRequest) -> Outcome:
    """Sends one request and reads its stream to the end."""
    arrivals: list[tuple[float, int]] = []
    steps = 0
    sent = time.monotonic()
    for part in client.stream(request):
        if part.token_ids:
            arrivals.append((time.monotonic(), len(part.token_ids)))
        if part.HasField("final"):
            steps = part.final.speculation.steps
    return Outcome(sent=sent, arrivals=tuple(arrivals), steps=steps)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the values lie below."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
