"""What the engine draws with drafts follows the exact probabilities; a wrong rule is caught.

The model's layers are silent, so that a token depends on the one before it alone: what rows say is
a Markov chain, whose chances the plain references tell.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.model.backends.load import load_backend
from lorastack.request import HeadsUse, Request, SamplingParams, SpeculationParams, StopParams
from lorastack.sampling.reference import survivors
from lorastack.speculation.accept import Accepted, Nodes
from lorastack.speculation.tree import Tree
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.chi_square import p_value
from tests.helpers.reference import Reference
from tests.helpers.scripted import Bench, Output, Script, scripted_heads
from tests.helpers.tiny import build_llama

SIZE = 8  # vocabulary: so small that random guesses are right at times
LENGTH = 125  # generated tokens of a row
ENOUGH = 300  # rows for 37,500 draws
HEADS = "heads"
CASES = {
    "temperature": SamplingParams(temperature=0.9),
    "filters": SamplingParams(temperature=1.6, top_k=7, top_p=0.93, min_p=0.06),
}
Chances = dict[int, dict[int, float]]  # token before -> token -> its chance


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("silent") / "model"
    build_llama(folder, num_layers=1, vocab_size=SIZE, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def exact_chances(model: Path, params: SamplingParams) -> Chances:
    reference = Reference(model, {})
    chances = {}
    for token in range(SIZE):
        left = survivors(reference.logits([token])[0].tolist(), params)
        total = math.fsum(math.exp(value) for value in left.values())
        chances[token] = {each: math.exp(value) / total for each, value in left.items()}
    return chances


def generate(model: Path, params: SamplingParams, count: int) -> dict[str, Output]:
    """The outputs of so many rows, drafted by guesses."""
    decoder = load_backend(
        model, device=torch.device("cpu"), dtype=torch.float32, max_context=None, native=False
    )
    bench = Bench(decoder, Tokenizer.load(model), {HEADS: scripted_heads(HEADS, 2)})
    requests = [
        Request(
            request_id=str(number),
            prompt_ids=(number % SIZE,),
            sampling=replace(params, seed=number),
            stop=StopParams(max_new_tokens=LENGTH, ignore_eos=True),
            speculation=SpeculationParams(max_nodes=3),
            heads=HeadsUse(medusa_id=HEADS, digest=HEADS),
        )
        for number in range(count)
    ]
    script = Script(num_pages=32 * 9)
    return bench.run(requests, script, random.Random(1))


def how_likely(outputs: dict[str, Output], chances: Chances) -> float:
    """p of the tokens behind each token."""
    followers: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for name, output in outputs.items():
        for token, follower in pairwise([int(name) % SIZE, *output.ids]):
            followers[token][follower] += 1
    return p_value((counts, chances[token]) for token, counts in followers.items())


@pytest.mark.parametrize(
    ("name", "count"),
    [("filters", 100), *(pytest.param(name, ENOUGH, marks=pytest.mark.slow) for name in CASES)],
)
@pytest.mark.timeout(600)
def test_tokens_follow_the_exact_probabilities(model: Path, name: str, count: int) -> None:
    outputs = generate(model, CASES[name], count)
    accepted = sum(each.final.speculation.accepted.total() for each in outputs.values())
    steps = sum(each.final.speculation.steps for each in outputs.values())
    assert accepted / steps > 0.2
    assert how_likely(outputs, exact_chances(model, CASES[name])) > 1e-4


def test_a_rule_that_is_not_lossless_is_caught(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WRONG: the first child stands with its own probability, or else its parent draws as ever."""
    params = CASES["temperature"]
    chances, guess = exact_chances(model, params), random.Random(2)

    def by_chance(rows: Sequence[Tree], draw: Callable[[Nodes], list[int]]) -> list[Accepted]:
        paths = []
        for row in rows:
            path = [0]
            while children := row.children[path[-1]]:
                child = children[0]
                if guess.random() >= chances[row.tokens[path[-1]]][row.tokens[child]]:
                    break
                path.append(child)
            paths.append(path)
        drawn = draw([(row, path[-1], len(path) - 1) for row, path in enumerate(paths)])
        return [
            Accepted(tuple(path[1:]), (*(row.tokens[node] for node in path[1:]), token))
            for row, path, token in zip(rows, paths, drawn, strict=True)
        ]

    monkeypatch.setattr("lorastack.model.backends.accept.accept", by_chance)
    assert how_likely(generate(model, params, 100), chances) < 1e-12
