"""How many more tokens a step do adaptive trees accept than the best static tree of as many nodes?

Exact replay of the base's greedy text, no server: per position the heads' candidates and the tokens
that came say what every tree accepts there. An adaptive tree takes the nodes that are worth more
than a threshold, one for the whole text, found so that the mean size over the steps is 4 or 8; what
heads are worth is learnt as in the server, from nothing. Its opponent is the best static tree for
this very text, which flatters it; the heads' own was chosen on other text.
Intervals: 95%, bootstrap over answers, both trees on the same ones.

    python -m benchmarks.trees --heads examples/adapters/heads-maths --prompts questions.jsonl

The base model, or that with a bundle's LoRA, answers the prompts first; their file is as for
`lorastack train heads`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.report import report
from lorastack.config import EngineConfig, ModelConfig
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.candidates import Node, grow, looked_up
from lorastack.speculation.lookup import Lookup
from lorastack.speculation.proposal import Proposal
from lorastack.train.corpus import Corpus
from lorastack.train.distill import DistillOptions, distill
from lorastack.train.evaluate import selected_lm_head
from lorastack.train.folder import HeadsFolder, load_heads
from lorastack.train.local import open_engine
from lorastack.train.measure import TreePath, search_choices, tokens_per_step
from lorastack.train.prompts import PromptFile

SIZES = (4, 8)
RANKS = 10  # candidates of a head, for all trees
MAX_NODES, MAX_DEPTH = 48, 8
BEYOND = 1000  # rank of a token that is no candidate
CHUNK = 512  # positions
BISECTIONS = 10
BOOTSTRAPS = 1000

Counts = list[tuple[int, int]]  # (tokens, steps) of each answer


@dataclass(frozen=True, slots=True)
class Answer:
    """What the base said, and at each of its tokens (T) the heads' (K) candidates (R)."""

    prompt_ids: list[int]
    ids: list[int]
    candidates_TKR: Tensor
    logprobs_TKR: Tensor
    ranks_TK: Tensor  # ranks of the tokens that came


@dataclass(frozen=True, slots=True)
class Replay:
    counts: Counts
    nodes: int

    @property
    def mean_size(self) -> float:
        return self.nodes / sum(steps for _, steps in self.counts)


def main(
    heads: Annotated[Path, typer.Option(help="Folder of the heads.")],
    prompts: Annotated[Path, typer.Option(help="For the base to answer.")],
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 256,
) -> None:
    """Replay, print a table and a JSON line."""
    with (
        TemporaryDirectory() as place,
        open_engine(ModelConfig(), EngineConfig()) as engine,
    ):
        selection = engine.add_folder(heads)
        options = DistillOptions(max_new_tokens=max_new_tokens)
        distill(engine, PromptFile(prompts), selection, Path(place), options)
        loaded = load_heads(heads, engine.model.backend.shapes)
        lm_head_VH, _ = selected_lm_head(engine, selection)
        answers = replayable(loaded, Corpus.open(Path(place)), lm_head_VH)
    config = json.loads((heads / "config.json").read_text(encoding="utf-8"))
    own_choices = [tuple(path) for path in config["medusa_choices"]]
    rows = [row for size in SIZES for row in compare(answers, own_choices, size)]
    report(
        f"Trees of {heads.name}",
        rows,
        answers=len(answers),
        tokens=sum(len(answer.ids) for answer in answers),
    )


@torch.inference_mode()
def replayable(loaded: HeadsFolder, corpus: Corpus, lm_head_VH: Tensor) -> list[Answer]:
    heads, ids_N = loaded.heads.to(lm_head_VH.device, lm_head_VH.dtype), loaded.ids_N
    if ids_N is None:
        ids_N = torch.arange(len(lm_head_VH))
    rows_NH = lm_head_VH[ids_N]
    candidates, logprobs = [], []
    positions_P = torch.arange(corpus.num_tokens)
    for hidden_PH in corpus.hidden(positions_P).split(CHUNK):
        best = [
            torch.log_softmax((heads.state(hidden_PH, head) @ rows_NH.T).float(), -1).topk(RANKS)
            for head in range(heads.num_heads)
        ]
        candidates.append(torch.stack([ids_N[top.indices] for top in best], 1))
        logprobs.append(torch.stack([top.values for top in best], 1))
    candidates_TKR, logprobs_TKR = torch.cat(candidates), torch.cat(logprobs)
    right_TKR = candidates_TKR == corpus.targets(positions_P, heads.num_heads)[:, :, None]
    ranks_TK = right_TKR.long().argmax(-1).masked_fill(~right_TKR.any(-1), BEYOND)
    starts = corpus.starts.tolist()
    return [
        Answer(
            corpus.prompt(sample).tolist(),
            corpus.answers(sample).tolist(),
            candidates_TKR[begin:end],
            logprobs_TKR[begin:end],
            ranks_TK[begin:end],
        )
        for sample, (begin, end) in enumerate(pairwise(starts))
    ]


def compare(
    answers: Sequence[Answer], own_choices: list[TreePath], size: int
) -> Iterator[dict[str, object]]:
    """One row a tree. The first is the opponent of all."""
    counted = search_choices(torch.cat([answer.ranks_TK for answer in answers]))
    climbs = [climbed(answers, start[:size], counted) for start in (own_choices, counted)]
    opponent = max((static(answers, tree) for tree in climbs), key=rate)
    yield row("static, best for this text", opponent, size, opponent)
    yield row("static, the heads' own", static(answers, own_choices[:size]), size, opponent)
    for name, learns, looks_up in (
        ("adaptive, nothing learnt", False, False),
        ("adaptive", True, False),
        ("adaptive with prompt lookup", True, True),
    ):
        replay = of_mean_size(answers, size, learns=learns, looks_up=looks_up)
        yield row(name, replay.counts, replay.mean_size, opponent)


def climbed(
    answers: Sequence[Answer], tree: list[TreePath], others: Sequence[TreePath]
) -> list[TreePath]:
    """Change a path for another of `others`, while a replay of this very text gains by it."""
    others = others[: 3 * len(tree)]
    best = rate(static(answers, tree))
    better: list[TreePath] | None = tree
    while better is not None:
        tree, better = better, None
        for leaf in [path for path in tree if not any(other[:-1] == path for other in tree)]:
            rest = [path for path in tree if path != leaf]
            for path in others:
                if path in tree or (path[:-1] and path[:-1] not in rest):
                    continue
                gained = rate(static(answers, [*rest, path]))
                if gained > best:
                    best, better = gained, [*rest, path]
    return tree


def row(name: str, counts: Counts, size: float, opponent: Counts) -> dict[str, object]:
    ratio = rate(counts) / rate(opponent)
    low, high = interval(counts, opponent)
    return {
        "tree": name,
        "mean nodes": round(size, 2),
        "tokens a step": round(rate(counts), 3),
        "more": f"{ratio - 1:+.1%}",
        "95%": f"{low - 1:+.1%} to {high - 1:+.1%}",
    }


def rate(counts: Counts) -> float:
    return sum(tokens for tokens, _ in counts) / sum(steps for _, steps in counts)


def interval(counts: Counts, opponent: Counts) -> tuple[float, float]:
    """95% of the ratio of their rates, answers drawn again and again."""
    rng = random.Random(0)
    ratios = []
    for _ in range(BOOTSTRAPS):
        drawn = rng.choices(range(len(counts)), k=len(counts))
        ratios.append(rate([counts[i] for i in drawn]) / rate([opponent[i] for i in drawn]))
    ratios.sort()
    return ratios[BOOTSTRAPS // 40], ratios[-BOOTSTRAPS // 40]


def static(answers: Sequence[Answer], choices: Sequence[TreePath]) -> Counts:
    return [
        tokens_per_step(answer.ranks_TK, [0, len(answer.ids)], choices)
        for answer in answers
        if len(answer.ids) > 1
    ]


def of_mean_size(answers: Sequence[Answer], size: int, *, learns: bool, looks_up: bool) -> Replay:
    """The replay whose threshold gives trees of about this mean size."""
    low, high = 0.001, 0.5
    for _ in range(BISECTIONS):
        threshold = (low * high) ** 0.5
        replay = adaptive(answers, threshold, learns=learns, looks_up=looks_up)
        if replay.mean_size > size:
            low = threshold
        else:
            high = threshold
    return replay


def adaptive(
    answers: Sequence[Answer], threshold: float, *, learns: bool, looks_up: bool
) -> Replay:
    """One calibration serves all answers, one after the other, as a server's does."""
    calibration = Calibration()
    counts, num_nodes = [], 0
    for answer in answers:
        candidates = answer.candidates_TKR.tolist()
        logprobs = answer.logprobs_TKR.tolist()
        lookup = Lookup(answer.prompt_ids + answer.ids[:1]) if looks_up else Lookup()
        at = steps = 0
        while at < len(answer.ids) - 1:
            continuation = lookup.find(MAX_DEPTH)
            chains = [looked_up(continuation, calibration)]
            proposal = Proposal(candidates[at], logprobs[at])
            stream = grow(proposal, chains, calibration, MAX_NODES, MAX_DEPTH)
            nodes = list(takewhile(lambda node: node.worth >= threshold, stream))
            drawn = accepted(nodes, answer.ids[at + 1 :])
            if learns:
                calibration.record_proposal(proposal, drawn)
                calibration.record_lookup(*continuation, drawn)
            if looks_up:
                for token in drawn:
                    lookup.push(token)
            at += len(drawn)
            steps += 1
            num_nodes += len(nodes)
        if steps:
            counts.append((at, steps))
    return Replay(counts, num_nodes)


def accepted(nodes: Sequence[Node], coming: Sequence[int]) -> Sequence[int]:
    """The tokens of a step, of those that are to come: the accepted ones and one more."""
    children = {(node.parent, node.token): place for place, node in enumerate(nodes, start=1)}
    at = count = 0
    while count < len(coming) and (child := children.get((at, coming[count]))) is not None:
        at = child
        count += 1
    return coming[: count + 1]


if __name__ == "__main__":
    typer.run(main)
