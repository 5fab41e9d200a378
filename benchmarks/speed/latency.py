"""Gaps between the tokens of eight running rows, in peace and while a long prompt arrives."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.paging.traffic import Background
from lorastack.client import Client
from lorastack.client.traffic import Outcome, percentile, stream
from lorastack.v1 import generation_pb2 as pb

ROWS = 8
NEW_TOKENS = 256
LONG_PROMPT = 2000
SETTLE_SECONDS = 1.5  # from the rows' first tokens to the long prompt


@dataclass(frozen=True, slots=True)
class Gaps:
    """Seconds. steady: before the long prompt was sent; stall: the longest while it ran."""

    median: float
    p99: float
    stall: float


def measure(
    client: Background, address: str, prompts: list[list[int]], long_prompt: list[int]
) -> Gaps:
    """prompts: of the rows that run."""
    return client.run(_measure, address, prompts, long_prompt)


def _measure(address: str, prompts: list[list[int]], long_prompt: list[int]) -> Gaps:
    with Client(address) as client, ThreadPoolExecutor(len(prompts)) as pool:
        began = time.monotonic()
        for first in [pool.submit(stream, client, _request(prompt, 1)) for prompt in prompts]:
            first.result()
        prefill = time.monotonic() - began  # which takes seconds on a slow CPU
        requests = [_request(prompt, NEW_TOKENS) for prompt in prompts]
        rows = [pool.submit(stream, client, request) for request in requests]
        time.sleep(prefill + SETTLE_SECONDS)
        long = stream(client, _request(long_prompt, 1))
        return gaps([row.result() for row in rows], long)


def gaps(rows: list[Outcome], long: Outcome) -> Gaps:
    """Gaps count from the moment when all rows run; one that ends after the long prompt was sent
    and begins before its first token is that prompt's."""
    began = max(row.arrivals[0][0] for row in rows)
    first = long.arrivals[0][0]
    spans = [(a, b) for row in rows for (a, _), (b, _) in pairwise(row.arrivals) if a >= began]
    steady = [after - before for before, after in spans if after <= long.sent]
    during = [b - a for a, b in spans if b > long.sent and a < first]
    return Gaps(statistics.median(steady), percentile(steady, 0.99), max(during))


def _request(prompt: list[int], new_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        medusa_id="none",
        speculation=pb.Speculation(mode=pb.OFF),
        stop=pb.StopParams(max_new_tokens=new_tokens, ignore_eos=True),
    )
