"""Right or wrong, behind the logits: samples, acceptance, moved KV, heads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.compare import error_of
from benchmarks.gpu.models import random_heads
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import DTYPES, Setting
from lorastack.kernels.heads import (
    HeadsGroup,
    HeadsWeights,
    PrivateWeights,
    states_reference,
    top_reference,
)
from lorastack.kernels.sample import Sample, sample_torch
from lorastack.kernels.triton import heads as heads_kernels
from lorastack.kernels.triton.accept import Accepted, Slots, Trees, accept, move_kv
from lorastack.kernels.triton.heads_plan import Layout, Pairs, lay_out
from lorastack.kernels.triton.samples import Nodes, Sampled, num_spans, sample, settings_of
from lorastack.kernels.triton.top import top
from lorastack.model.kv import KVCache, Move
from lorastack.request import SamplingParams, TokenSource
from lorastack.speculation import accept as rule
from lorastack.speculation.tree import Tree

EXACT = 2e-5  # relative error of sums in float32
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
)


def cases(setting: Setting) -> Cases:
    """By kernel."""
    kernels: dict[str, Callable[[Setting], Iterator[Finding]]] = {
        "samples": _samples,
        "trees": _trees,
        "heads": _heads,
    }
    return {name: partial(run, setting) for name, run in kernels.items()}


class Draw:
    """The kernels' samples of logits, every row a tree of its own."""

    def __init__(self, setting: Setting, logits_XV: Tensor, samples: list[Sample]) -> None:
        count, vocab = logits_XV.shape
        self._logits_XV = logits_XV
        settings = [settings_of(each.params, each.token_index) for each in samples]
        self._nodes = Nodes(
            setting.ints(*range(count)),
            torch.zeros(count, dtype=torch.int32, device=setting.device),
            torch.tensor(settings, device=setting.device),
            setting.ints(count),
        )
        empty = partial(torch.full, (count,), -1, dtype=torch.int32, device=setting.device)
        self.found = Sampled(setting.poisoned(count), empty(), empty())
        spans = num_spans(vocab)
        self._keys_XS = torch.zeros(count, spans, dtype=torch.int64, device=setting.device)

    def __call__(self) -> None:
        """Fills `found`."""
        sample(self._logits_XV, self._nodes, self._keys_XS, self.found, len(self._logits_XV))


def _samples(setting: Setting) -> Iterator[Finding]:
    chance = random.Random(1)
    vocab, count = setting.mistral.vocab_size, 6 if setting.tiny else 60
    logits_XV = 3 * setting.random(count, vocab)
    logits_XV[0, 5:9] = logits_XV[0].max() + 1  # a tie
    samples = [
        Sample(row, SamplingParams(seed=chance.getrandbits(64), **SAMPLINGS[row % 6]), row)
        for row in range(count)
    ]
    draw = Draw(setting, logits_XV, samples)
    draw()
    found = draw.found
    host_XV = logits_XV.cpu()
    expected = [
        int(host_XV[each.row].argmax()) if each.params.greedy else sample_torch(host_XV, [each])[0]
        for each in samples
    ]
    expected[0] = 5
    wrong = sum(a != b for a, b in zip(found.tokens_X.tolist(), expected, strict=True))
    yield Finding(f"tokens of {count} that differ", wrong, most=0)
    best = torch.equal(found.peaks_X.cpu(), host_XV.amax(1)) and bool(
        (host_XV.gather(1, found.best_X.cpu().long()[:, None])[:, 0] == host_XV.amax(1)).all()
    )
    yield Finding("best tokens and logits that are wrong", int(not best), most=0)


def random_trees(chance: random.Random, count: int, most: int) -> list[Tree]:
    """Siblings carry distinct tokens of 0 to 9."""
    trees = []
    for _ in range(count):
        tokens, parents = [chance.randrange(10)], [-1]
        for _ in range(chance.randrange(most)):
            parent = chance.randrange(len(parents))
            taken = {tokens[i] for i, each in enumerate(parents) if each == parent}
            token = chance.randrange(10)
            if token not in taken:
                tokens.append(token)
                parents.append(parent)
        sources = (TokenSource.MODEL, *(TokenSource.HEADS for _ in tokens[1:]))
        trees.append(Tree(tuple(tokens), tuple(parents), sources))
    return trees


def _trees(setting: Setting) -> Iterator[Finding]:
    """Acceptance and moves of trees that lie on shuffled pages."""
    chance, page_size, nodes = random.Random(2), 4, 16
    trees = random_trees(chance, 6 if setting.tiny else 40, nodes)
    firsts = [sum(each.num_nodes for each in trees[:i]) for i in range(len(trees))]
    count = sum(each.num_nodes for each in trees)
    # Two of three tokens are some child's, so that paths grow.
    sampled = [
        chance.choice([tree.tokens[child] for child in tree.children[node]] * 2 + [11])
        if tree.children[node]
        else 11
        for tree in trees
        for node in range(tree.num_nodes)
    ]
    ints = setting.ints
    on_device = Trees(
        ints(*firsts),
        ints(*(each.num_nodes for each in trees)),
        ints(*(token for each in trees for token in each.tokens)),
        ints(*(parent for each in trees for parent in each.parents)),
        ints(len(trees)),
    )
    room = partial(torch.zeros, dtype=torch.int32, device=setting.device)
    out = Accepted(room(count), room(count), room(count))
    accept(ints(*sampled), on_device, out, count, nodes)
    expected = rule.accept(trees, lambda level: [sampled[firsts[i] + node] for i, node, _ in level])
    wrong = 0
    for i, each in enumerate(expected):
        path_X = out.path_X[firsts[i] :][: int(out.lengths_B[i])]
        wrong += tuple(path_X.tolist()) != each.path
    yield Finding(f"paths of {len(trees)} that differ", wrong, most=0)

    committed = [chance.randrange(9) for _ in trees]
    free = list(range(len(trees) * 8))
    chance.shuffle(free)
    tables = [[free.pop() for _ in range(7)] for _ in trees]
    kv = KVCache(setting.mistral, len(trees) * 8, page_size, torch.bfloat16, setting.device)
    kv.data.copy_(setting.random(*kv.data.shape, dtype=kv.data.dtype))
    moved = kv.data.clone()
    slots = Slots(
        ints(*(page for table in tables for page in table)),
        ints(*(7 * i for i in range(len(trees)))),
        ints(*committed),
    )
    move_kv(moved, out, slots, on_device, count)
    kv.move(
        [
            Move(
                table,
                [root + node for node in each.path],
                range(root + 1, root + 1 + len(each.path)),
            )
            for table, root, each in zip(tables, committed, expected, strict=True)
        ]
    )
    yield Finding("numbers of KV that differ", int((moved != kv.data).sum()), most=0)


def _heads(setting: Setting) -> Iterator[Finding]:
    shapes, num = setting.mistral, 8
    count = 3 if setting.tiny else 12
    for name, dtype in DTYPES.items():
        make = partial(random_heads, shapes, dtype, setting.device)
        groups = [
            (make(num_heads=3), [0, 2]),
            (make(num_heads=2, num_blocks=2, private_rank=5), [1]),
        ]
        pairs, layout = pairs_of(setting, groups)
        hidden_XH = setting.random(count, shapes.hidden_size, dtype=dtype)
        ends = [0, 2, 1]
        rows = len(layout.tree_Y)
        r_LYH = setting.poisoned(2, rows, shapes.hidden_size, dtype=dtype)
        tiles = max(len(layout.states), len(layout.outputs))
        ends_B = setting.ints(*ends)
        heads_kernels.states(hidden_XH, ends_B, pairs, r_LYH, tiles, 2, layout.max_rank)
        logits_YN = setting.poisoned(rows, max(layout.num_outputs_Y))
        heads_kernels.logits(r_LYH, pairs, logits_YN, tiles)
        ids_YR = torch.zeros(rows, num, dtype=torch.int32, device=setting.device)
        logprobs_YR = setting.poisoned(rows, num)
        top(logits_YN, pairs, ids_YR, logprobs_YR, rows)
        worst, products, start, wrong = 0.0, 0.0, 0, 0
        for heads, trees in groups:
            own = slice(start, start + len(trees) * heads.num_heads)
            start = own.stop
            state_BH = hidden_XH[[ends[tree] for tree in trees]]
            group = HeadsGroup(0, len(trees), heads)
            r_YH = states_reference(state_BH.cpu(), [_on_cpu(group)])
            worst = max(worst, error_of(r_LYH[len(heads.bias_LKH) - 1, own].cpu(), r_YH))
            assert heads.output is not None and heads.ids_N is not None
            found_YN = logits_YN[own, : len(heads.output)]
            # Of the states that were found: those were compared themselves.
            meant_YN = r_LYH[len(heads.bias_LKH) - 1, own].double() @ heads.output.double().t()
            products = max(products, error_of(found_YN, meant_YN))
            best = top_reference(found_YN.cpu(), num)
            wrong += int((heads.ids_N.cpu()[best.ids_XR] != ids_YR[own].cpu()).sum())
            worst = max(worst, error_of(logprobs_YR[own].cpu(), best.logprobs_XR))
        most = 2e-2 if dtype == torch.bfloat16 else EXACT
        yield Finding(f"{name}, states and log-probabilities", worst, "relative error", most=most)
        yield Finding(f"{name}, logits", products, "relative error", most=EXACT)
        yield Finding(f"{name}, candidates that differ", wrong, most=0)


def pairs_of(
    setting: Setting, groups: Sequence[tuple[HeadsWeights, Sequence[int]]]
) -> tuple[Pairs, Layout]:
    """A step's heads on the device."""
    layout = lay_out(groups)
    longs = partial(torch.tensor, dtype=torch.int64, device=setting.device)
    pairs = Pairs(
        longs(layout.states),
        longs(layout.outputs),
        setting.ints(*layout.tree_Y),
        setting.ints(*layout.num_outputs_Y),
        longs(layout.ids_Y),
        setting.ints(len(layout.states), len(layout.outputs), len(layout.tree_Y)),
    )
    return pairs, layout


def _on_cpu(group: HeadsGroup) -> HeadsGroup:
    heads, private = group.heads, group.heads.private
    assert heads.output is not None and heads.ids_N is not None
    tensors = (heads.weight_LKHH, heads.bias_LKH, heads.output, heads.ids_N)
    if private is not None:
        private = PrivateWeights(private.a_LKRH.cpu(), private.b_LKHR.cpu())
    host = HeadsWeights(*(each.cpu() for each in tensors), private=private)
    return HeadsGroup(group.start, group.end, host)
