"""What is measured: batches of prompts, and the bytes that a step of each must read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from benchmarks.peers.protocol import About, Job
from benchmarks.speed.results import GAPS, MATHS
from lorastack.client import ChatMessage, ChatMessages, Client, TokenizeRequest

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts"
ROWS = (1, 2, 4, 8, 16, 32)
NEW_TOKENS = 64
PROMPT_TOKENS = 64
PREFILL_TOKENS = 1000
MAX_ID = 40_000  # random first ids that make prompts new stay below it, and below special ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row of the table. key: its name on the command line. loras: of each row of the batch."""

    key: str
    name: str
    loras: tuple[tuple[str, ...], ...]
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS

    @property
    def adapters(self) -> set[str]:
        return {lora_id for row in self.loras for lora_id in row}

    def fits(self, peer: About) -> bool:
        """True if a peer, none of which stacks LoRAs, can run it."""
        return not self.adapters or (peer.mixed_loras and all(len(row) == 1 for row in self.loras))

    @property
    def is_prefill(self) -> bool:
        return self.prompt_tokens == PREFILL_TOKENS


def all_cases(loras: Sequence[str]) -> list[Case]:
    """Base at 1 to 32 rows; as many rows as LoRAs, each with its own, or with it and the next."""
    rotated = [*loras[1:], *loras[:1]]
    count = len(loras)
    return [
        *(Case(key=str(rows), name=f"base, {rows} rows", loras=((),) * rows) for rows in ROWS),
        Case(key="loras", name=f"{count} rows, {count} LoRAs", loras=tuple((a,) for a in loras)),
        Case(
            key="stacks",
            name=f"{count} rows, stacks of 2",
            loras=tuple(zip(loras, rotated, strict=True)),
        ),
        Case(
            key="prefill", name="prefill", loras=((),), prompt_tokens=PREFILL_TOKENS, new_tokens=1
        ),
    ]


PARTS = (*(case.key for case in all_cases(())), MATHS, GAPS)


class Prompts:
    """The project's prompts as token ids. Each call gives new ones: no prefix is cached."""

    def __init__(self, client: Client, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.maths = [chat_ids(client, prompt) for prompt in read("maths.jsonl")]
        self._text = [token for prompt in read("chat.jsonl") for token in chat_ids(client, prompt)]

    def job(self, case: Case, most_tokens: int = NEW_TOKENS) -> Job:
        """Prompts end like a user's maths question, cut or filled in front to one length."""
        rows = islice(cycle(self._random.sample(self.maths, len(self.maths))), len(case.loras))
        prompts = [self.filled(ids, case.prompt_tokens) for ids in rows]
        return Job(prompts, min(case.new_tokens, most_tokens), case.loras)

    def filled(self, ids: list[int], length: int) -> list[int]:
        filler = islice(cycle(self._text), max(length - len(ids), 0))
        filled = [*filler, *ids][-length:]
        return [self._random.randrange(MAX_ID), *filled[1:]]


def chat_ids(client: Client, prompt: str) -> list[int]:
    chat = ChatMessages(messages=[ChatMessage(role="user", content=prompt)])
    return client.tokenize(TokenizeRequest(chat=chat))


def read(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (PROMPTS / name).read_text().splitlines()]
