"""What the benchmark and a peer's process say to each other: one JSON object a line, both ways.

    {"op": "load", "model": FOLDER, "gguf": FILE, "loras": {ID: FOLDER}, "threads": 2}
    -> {"name": "llama.cpp 0.3.36", "numbers": "bf16 weights, f16 KV", "instructions": "AVX2 FMA",
        "mixed_loras": false}
    {"op": "generate", "prompts": [[IDS], ...], "new_tokens": 64, "loras": [[ID], [], ...]}
    -> {"prompt_seconds": 0.1, "decode_seconds": 0.7, "decode_tokens": 504, "tokens": [[IDS], ...]}

All prompts of a request are one batch, greedy, past the end token. prompt_seconds: until every row
has its first token; decode_seconds: from there to the end, in which decode_tokens were made.
This file needs nothing but Python: peers import it in their own environments.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Load:
    """What a peer is given before its first request. gguf: the model in one file, or ""."""

    model: str
    gguf: str = ""
    loras: dict[str, str] = field(default_factory=dict)
    threads: int = 2


@dataclass(frozen=True, slots=True)
class About:
    """What a loaded peer says of itself.

    numbers: the kinds of its weights, KV and sums. instructions: those that it may use.
    mixed_loras: rows of one batch may have different ones.
    """

    name: str
    numbers: str
    instructions: str
    mixed_loras: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One batch. loras: ids a row; none: the base model; several: their sum."""

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    loras: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Done:
    """Times of a batch and its tokens, one list a row."""

    prompt_seconds: float
    decode_seconds: float
    decode_tokens: int
    tokens: list[list[int]]


class Engine(Protocol):
    """A loaded peer."""

    about: About

    def generate(self, job: Job) -> Done: ...


def serve(load: Callable[[Load], Engine]) -> None:
    """Answer requests of stdin until it ends. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what it says before it aborts is its reason
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("op"):
            case "load":
                engine = load(Load(**request))
                reply: dict[str, Any] = asdict(engine.about)
            case "generate":
                assert engine is not None, "load comes first"
                reply = asdict(engine.generate(Job(**request)))
            case other:
                raise ValueError(f"no such op: {other}")
        print(json.dumps(reply), file=replies, flush=True)
