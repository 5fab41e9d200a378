"""Our server in its modes, as an engine among others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from benchmarks.paging.traffic import Background
from benchmarks.peers.protocol import Done, Job
from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb

HEADS = "heads-maths"


class Engine(Protocol):
    """What a case measures."""

    def generate(self, job: Job) -> Done: ...


@dataclass(frozen=True, slots=True)
class Ours:
    """Our server through gRPC: unary calls of a client process of low priority.

    Whole replies, as the peers give them; what streaming costs a reader is in the gaps.

    max_nodes: drafted tokens a step at most; None: the server decides; 0: speculation off.
    """

    address: str
    client: Background
    max_nodes: int | None = None

    def generate(self, job: Job) -> Done:
        if job.new_tokens > 1:  # prompts are cached, so that rows decode together, as the peers' do
            self._send(job, 1)
        return done(self._send(job, job.new_tokens))

    def _send(self, job: Job, new_tokens: int) -> list[Reply]:
        rows = zip(job.prompts, job.loras, strict=True)
        requests = [self._request(*row, new_tokens) for row in rows]
        return self.client.run(send_all, self.address, requests)

    def _request(self, prompt: Sequence[int], loras: Sequence[str], new_tokens: int) -> bytes:
        return pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            loras=[pb.LoraRef(lora_id=lora_id) for lora_id in loras],
            medusa_id="none" if self.max_nodes == 0 else HEADS,
            speculation=pb.Speculation(
                mode=pb.OFF if self.max_nodes == 0 else pb.AUTO, max_nodes=self.max_nodes or None
            ),
            stop=pb.StopParams(max_new_tokens=new_tokens, ignore_eos=True),
        ).SerializeToString()


@dataclass(frozen=True, slots=True)
class Reply:
    """Seconds of the client's clock; the server says how long first token and all took."""

    sent: float
    first: float
    ended: float
    tokens: list[int]


def send_all(address: str, requests: list[bytes]) -> list[Reply]:
    """All at once. Runs in the client process."""
    with Client(address) as client, ThreadPoolExecutor(len(requests)) as pool:

        def send(request: bytes) -> Reply:
            sent = time.monotonic()
            reply = client.generate(pb.GenerateRequest.FromString(request))
            late = time.monotonic() - sent - reply.timings.total_ms / 1000
            first = sent + late + reply.timings.time_to_first_token_ms / 1000
            return Reply(sent, first, time.monotonic(), list(reply.token_ids))

        return list(pool.map(send, requests))


def done(replies: Sequence[Reply]) -> Done:
    """The batch's times: its prompts end when every row has its first token, and it decodes until
    one ends. What a row made in that time is taken from its own steady rate."""
    began = min(reply.sent for reply in replies)
    first = max(reply.first for reply in replies)
    ended = min(reply.ended for reply in replies)
    inside = [
        (len(reply.tokens) - 1) * (ended - first) / (reply.ended - reply.first)
        for reply in replies
        if len(reply.tokens) > 1
    ]
    tokens = [reply.tokens for reply in replies]
    return Done(first - began, ended - first, round(sum(inside)), tokens)
