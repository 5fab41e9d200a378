"""What the scenario asks: every way to name adapters, every kind of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import ask
from tests.integration.mistral_7b.adapters import BUNDLE, HEADS, OWN_HEADS

Stack = tuple[tuple[str, float], ...]

NUM_TOKENS = 20
MAX_NODES = 4
SHARED = "You are a helpful assistant. Answer the question of the user in one short sentence. "
PROMPTS = (
    "Why is the sky blue?",
    SHARED + "What is the capital of France?",
    "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return",
    SHARED + "Wie spät ist es? 何時ですか 🕰",
    "one two three one two three one two three one two",
)
STACKS: tuple[Stack, ...] = (
    (),
    (("lora-r8", 1.0),),
    (("lora-r16", 1.0),),
    (("lora-r64", 1.0),),
    ((BUNDLE, 1.0),),
    (("lora-r8", 1.0), ("lora-r64", 0.5)),
    (("lora-r16", -0.5), (BUNDLE, 1.0)),
)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "seed": 1},
    {"repetition_penalty": 1.3},
    {"temperature": 1.2, "seed": 2, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.7, "seed": 3, "min_p": 0.02, "frequency_penalty": 0.5},
    {},
)
# With these and the stacks' own, most rows draft. "": the bundle's, else the default ones.
HEADS_ASKED = (HEADS, "", HEADS, OWN_HEADS, "", HEADS, "none", HEADS)


def batch_of_8() -> list[pb.GenerateRequest]:
    """Plain, with heads, with a LoRA, with both, with stacks, with a bundle and its heads."""
    chosen: tuple[tuple[Stack, str], ...] = (
        ((), "none"),
        ((), HEADS),
        (STACKS[1], "none"),
        (STACKS[2], HEADS),
        (STACKS[3], OWN_HEADS),
        (STACKS[5], HEADS),
        (STACKS[4], ""),
        (STACKS[6], ""),
    )
    return [
        ask(
            PROMPTS[index % len(PROMPTS)],
            stack=stack,
            heads=heads,
            max_new_tokens=NUM_TOKENS,
            ignore_eos=True,
            sampling=SAMPLINGS[1] if index == 7 else {},
        )
        for index, (stack, heads) in enumerate(chosen)
    ]


def mixed(count: int, *, off: bool) -> list[pb.GenerateRequest]:
    """Requests of the ids 0, 1, ...: the same ones with drafts and without."""
    return [_mixed(index, off) for index in range(count)]


def _mixed(index: int, off: bool) -> pb.GenerateRequest:
    request = ask(
        PROMPTS[index % len(PROMPTS)],
        stack=STACKS[index % len(STACKS)],
        heads=HEADS_ASKED[index % len(HEADS_ASKED)],
        max_new_tokens=NUM_TOKENS - index % 5,
        off=off,
        stop=("the end",),
        sampling=SAMPLINGS[index % len(SAMPLINGS)],
        request_id=str(index),
    )
    request.speculation.max_nodes = MAX_NODES
    if index % 11 == 3:
        request.chat.messages.add(role="user", content=PROMPTS[0])  # replaces the prompt
    if index % 11 == 7:
        request.response_format.regex = r"[A-Z][a-z ]{3,40}\."
    return request


def together(client: Client, asked: Sequence[pb.GenerateRequest]) -> list[pb.GenerateResponse]:
    """All at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(client.generate, asked))
