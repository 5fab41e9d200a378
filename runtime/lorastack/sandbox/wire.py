"""What the server and its worker processes say to each other, over a socket.

A frame is its length, one byte for its kind, and its payload. The server sends SETUP once a task,
then a JOB at a time, to which there is exactly one reply; a CANCEL ends the job that runs, and
means nothing when none does.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum

from lorastack.config import MIB

PREFIX = struct.Struct("!IB")  # length of the payload, kind

SETUP, JOB, CANCEL = 1, 2, 3


class Outcome(IntEnum):
    """How a job ended: the kind of a reply."""

    DONE = 16  # the payload is the result
    REFUSED = 17  # the task refused; the payload says why
    CANCELLED = 18
    TOO_SLOW = 19  # out of processor time
    TOO_LATE = 20  # out of time by the wall clock: others had the processors
    TOO_MUCH_MEMORY = 21
    TOO_LONG = 22  # its result is
    CRASHED = 23  # a signal ended it, as when the stack is full


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one job, in seconds and bytes. memory: beyond what the worker has before it."""

    cpu: float
    wall: float
    memory: int
    output: int
    stack: int = MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One piece of work. task: see `sandbox.tasks`. body: its input, read by the task alone."""

    task: str
    body: bytes
    limits: Limits

    def to_bytes(self) -> bytes:
        head = json.dumps({"task": self.task, **asdict(self.limits)}).encode()
        return head + b"\n" + self.body

    @staticmethod
    def from_bytes(data: bytes) -> Job:
        head, _, body = data.partition(b"\n")
        fields = json.loads(head)
        task = fields.pop("task")
        return Job(task=task, body=body, limits=Limits(**fields))


def setup_bytes(task: str, given: Mapping[str, object]) -> bytes:
    """given: what the task prepares itself from, as JSON."""
    return json.dumps({"task": task, "given": given}).encode()
