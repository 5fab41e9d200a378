"""Tokens of speculative decoding follow the exact probabilities; a wrong rule is caught."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorastack.kernels.ops import NativeOps, fastest_ops
from lorastack.kernels.sample import Sample
from lorastack.request import SamplingParams, TokenSource, TypicalAcceptance
from lorastack.sampling.processors import Processor, needs_processor
from lorastack.sampling.reference import processed, survivors
from lorastack.sampling.sampler import posterior, sample
from lorastack.speculation.accept import Accepted, Nodes, accept, accept_typical
from lorastack.speculation.tree import Tree
from tests.helpers import chi_square

OPS = fastest_ops(torch.float32, 64, torch.device("cpu"))
ROWS = 50_000 if isinstance(OPS, NativeOps) else 10_000  # of two tokens; torch takes a ms for each
SIZE = 6
PROMPT = (2, 2, 5)
CONTEXTS: list[tuple[int, ...]] = [(), *((token,) for token in range(SIZE))]
SOURCES = (TokenSource.MODEL, TokenSource.HEADS)
CASES = {
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=1.5, top_k=3),
    "top_p": SamplingParams(temperature=1.0, top_p=0.8),
    "min_p": SamplingParams(temperature=1.2, min_p=0.25),
    "typical_p": SamplingParams(temperature=1.2, typical_p=0.6),
    "penalties": SamplingParams(
        temperature=1.0,
        repetition_penalty=1.4,
        frequency_penalty=0.7,
        presence_penalty=0.4,
        logit_bias=((1, 1.5), (4, -0.5)),
    ),
}


class Model:
    """Two tokens of a model of six, the second depending on the first, as one request wants them.

    Rows differ in their seeds, which are their numbers.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        generator = torch.Generator().manual_seed(4)
        self._logits_XV = 0.8 * torch.randn(len(CONTEXTS), SIZE, generator=generator)
        processor = Processor(params, PROMPT, None)
        self._processed: list[Tensor | None] = [None] * len(CONTEXTS)
        if needs_processor(params, None):
            self._processed = [
                processor.apply(logits_V, context)
                for context, logits_V in zip(CONTEXTS, self._logits_XV, strict=True)
            ]

    def sample(self, seeds: Sequence[int], contexts: Sequence[tuple[int, ...]]) -> list[int]:
        samples = [
            Sample(CONTEXTS.index(context), replace(self.params, seed=seed), len(context))
            for seed, context in zip(seeds, contexts, strict=True)
        ]
        processed = [self._processed[each.row] for each in samples]
        best_X = OPS.best(self._logits_XV)[1].tolist()
        return sample(OPS, self._logits_XV, best_X, samples, processed)

    def posterior(self, context: tuple[int, ...], token: int) -> tuple[float, list[float]]:
        row = CONTEXTS.index(context)
        own_V = self._processed[row]
        logits_V = self._logits_XV[row] if own_V is None else own_V
        return posterior(logits_V, self.params.temperature, [token])

    def probabilities(self, context: tuple[int, ...]) -> dict[int, float]:
        """Exact, by the plain references."""
        logits = self._logits_XV[CONTEXTS.index(context)].tolist()
        left = survivors(processed(logits, self.params, PROMPT, context), self.params)
        total = math.fsum(math.exp(value) for value in left.values())
        return {token: math.exp(value) / total for token, value in left.items()}


class Step:
    """Every row drafts one token: half of them what will be drawn, the others the next id."""

    def __init__(self, model: Model, count: int) -> None:
        self.model = model
        self.guess = random.Random(1)
        truth = model.sample(range(count), [()] * count)
        self.rows = [
            Tree((0, (token + self.guess.randrange(2)) % SIZE), (-1, 0), SOURCES) for token in truth
        ]

    def sample(self, nodes: Nodes) -> list[int]:
        contexts = [self.rows[row].tokens[1:] if node else () for row, node, _ in nodes]
        return self.model.sample([row for row, _, _ in nodes], contexts)


Rule = Callable[[Step], list[Accepted]]


def exact(step: Step) -> list[Accepted]:
    return accept(step.rows, step.sample)


def by_chance(step: Step) -> list[Accepted]:
    """WRONG: a child stands with its own probability, or else the root draws as ever."""
    chances = step.model.probabilities(())
    likely = [step.guess.random() < chances.get(row.tokens[1], 0.0) for row in step.rows]
    drawn = step.sample([(row, int(stands), 0) for row, stands in enumerate(likely)])
    return [
        Accepted((1,), (row.tokens[1], token)) if stands else Accepted((), (token,))
        for row, stands, token in zip(step.rows, likely, drawn, strict=True)
    ]


def typical(step: Step) -> list[Accepted]:
    """Medusa's rule, which is not lossless."""

    def look(nodes: Nodes) -> list[tuple[float, list[float]]]:
        return [step.model.posterior((), step.rows[row].tokens[1]) for row, _, _ in nodes]

    return accept_typical(step.rows, [TypicalAcceptance()] * len(step.rows), look, step.sample)


def generate(model: Model, rule: Rule, count: int) -> list[tuple[int, ...]]:
    """The first two tokens of each row, some of which come by a draft."""
    tokens = [accepted.tokens for accepted in rule(Step(model, count))]
    short = [row for row, found in enumerate(tokens) if len(found) == 1]
    assert len(short) < count
    for row, token in zip(short, model.sample(short, [tokens[row] for row in short]), strict=True):
        tokens[row] = (*tokens[row], token)
    return tokens


def p_value(model: Model, pairs: Sequence[tuple[int, ...]]) -> float:
    chances = {
        (first, second): chance * following
        for first, chance in model.probabilities(()).items()
        for second, following in model.probabilities((first,)).items()
    }
    return chi_square.p_value([(Counter(pairs), chances)])


@pytest.mark.parametrize("name", CASES)
def test_accepted_tokens_follow_the_exact_probabilities(name: str) -> None:
    model = Model(CASES[name])
    count = 10_000 if name == "typical_p" else ROWS  # typical tokens are always left to torch
    assert p_value(model, generate(model, exact, count)) > 1e-4


@pytest.mark.parametrize("rule", [by_chance, typical])
@pytest.mark.parametrize("name", ["temperature", "penalties"])
def test_the_check_catches_a_rule_that_is_not_lossless(name: str, rule: Rule) -> None:
    model = Model(CASES[name])
    assert p_value(model, generate(model, rule, 10_000)) < 1e-8
