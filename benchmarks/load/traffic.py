"""Rows that never run out: each of N slots sends its next request when the one before ends."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb

NO_HEADS = "none"
SHORTEST, LONGEST = 64, 192  # tokens of an output: slots drift apart and stay so


@dataclass(frozen=True, slots=True)
class Text:
    """What rows talk about, and the heads that draft it."""

    name: str
    heads: str
    prompts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Mode:
    """How rows draft. max_nodes: None leaves it to the server, 0 is OFF."""

    name: str
    max_nodes: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """Seconds of one clock: the client's, the first token placed by what the server says."""

    first: float
    ended: float
    tokens: int

    def tokens_within(self, began: float, ended: float) -> float:
        """The reply's tokens between these times, at its own steady rate."""
        inside = min(self.ended, ended) - max(self.first, began)
        return max(inside, 0.0) * (self.tokens - 1) / (self.ended - self.first)


def requests(text: Text, mode: Mode, slots: int, each: int, seed: int) -> list[list[bytes]]:
    """`each` requests a slot, the same for every mode; greedy, past the end token."""
    rng = random.Random(seed)
    return [[_request(text, mode, rng) for _ in range(each)] for _ in range(slots)]


def _request(text: Text, mode: Mode, rng: random.Random) -> bytes:
    message = pb.ChatMessage(role="user", content=rng.choice(text.prompts))
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[message]),
        medusa_id=text.heads,
        speculation=pb.Speculation(
            mode=pb.OFF if mode.max_nodes == 0 else pb.AUTO, max_nodes=mode.max_nodes or None
        ),
        stop=pb.StopParams(max_new_tokens=rng.randint(SHORTEST, LONGEST), ignore_eos=True),
    ).SerializeToString()


def run(address: str, slots: list[list[bytes]]) -> list[list[Reply]]:
    """Every slot's requests, one after the other. Runs in a client process; replies are whole."""
    with Client(address) as client, ThreadPoolExecutor(len(slots)) as pool:

        def send(request: bytes) -> Reply:
            reply = client.generate(pb.GenerateRequest.FromString(request))
            ended = time.monotonic()
            timings = reply.timings
            decoding = (timings.total_ms - timings.time_to_first_token_ms) / 1000
            return Reply(ended - decoding, ended, len(reply.token_ids))

        return list(pool.map(lambda slot: [send(request) for request in slot], slots))


def steady_rate(slots: list[list[Reply]]) -> float:
    """Tokens a second while every slot had a row: from the last one's first token until one ends
    for good."""
    began = max(replies[0].first for replies in slots)
    ended = min(replies[-1].ended for replies in slots)
    tokens = sum(reply.tokens_within(began, ended) for replies in slots for reply in replies)
    return tokens / (ended - began)
