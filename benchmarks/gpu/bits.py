"""Bits: a token's own row decides them, whoever is beside it, in whatever bucket, tree or chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu.compare import AttentionStep, LoraStep, products
from benchmarks.gpu.models import random_backend, random_lora
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting
from lorastack.kernels.quantize import Kind
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.weight import MatmulPlan, Weight, pack_weight
from lorastack.layout import GROUPS, LAYER_TARGETS, LM_HEAD
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.triton.inputs import BUCKETS
from lorastack.model.context import RowSpan
from lorastack.model.kv import Move
from tests.helpers.native import RowPart, run

TOKENS = (1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 128, 256)
REPEATS = 50
LOAD = 40  # products beside a repeat


def cases(setting: Setting) -> Cases:
    """By what sums."""
    kinds: dict[str, Callable[[Setting], Iterator[Finding]]] = {
        "matmul": _matmul,
        "attention": _attention,
        "LoRA": _lora,
        "whole steps": _steps,
    }
    if setting.on_device:
        kinds |= {"repeats under load": _repeats, "cuBLAS": _cublas}
    return {name: partial(run, setting) for name, run in kinds.items()}


def unequal_rows(found: Tensor, expected: Tensor) -> int:
    """Rows in which any bit differs; NaN equals nothing."""
    return int((found != expected).flatten(1).any(dim=1).sum())


def _weights(setting: Setting) -> dict[str, Weight]:
    """Those of the model; quantised ones of its longest rows."""
    bfloat16 = partial(setting.random, dtype=torch.bfloat16)
    if setting.tiny:  # with chunks, which such short rows would not have
        plain = pack_weight(bfloat16(40, 200))
        codes = pack_weight(bfloat16(40, 300), kind=Kind.INT4)
        return {
            "plain": replace(plain, plan=MatmulPlan.cut(200, 3, 64, 64)),
            "int4": replace(codes, plan=MatmulPlan.cut(300, 2, 64, 128)),
        }
    shapes = setting.mistral
    weights = {}
    for targets in (*GROUPS, (LM_HEAD,)):
        outputs = sum(shapes.target_shape(target)[0] for target in targets)
        inputs = shapes.target_shape(targets[0])[1]
        weights["+".join(targets)] = pack_weight(bfloat16(outputs, inputs))
    for kind in Kind:
        shape = shapes.target_shape("down_proj")
        weights[f"down_proj {kind}"] = pack_weight(bfloat16(*shape), kind=kind)
    weights["down_proj float32"] = pack_weight(setting.random(*shape))
    return weights


def _matmul(setting: Setting) -> Iterator[Finding]:
    """Permuted rows, by number of tokens, in every bucket that takes them."""
    counts, buckets = ((1, 3, 17), (4, 24, 96)) if setting.tiny else (TOKENS, BUCKETS)
    for name, weight in _weights(setting).items():
        dtype = torch.bfloat16 if weight.kind or weight.values.dtype != torch.float32 else None
        x_TI = setting.random(max(counts), weight.num_inputs, dtype=dtype or torch.float32)
        expected_TO, unequal, total = products(setting, x_TI, weight, max(buckets)), 0, 0
        for count in counts:
            for bucket in (each for each in buckets if each >= count):
                rows = torch.randperm(len(x_TI), device=setting.device)[:count]
                found_TO = products(setting, x_TI[rows], weight, bucket)
                unequal += unequal_rows(found_TO, expected_TO[rows])
                total += count
        yield Finding(f"{name}, rows of {total} with other bits", unequal, most=0)


PARENTS = (-1, 0, 0, 1, 1, 2, 4, 4)  # a tree; its path:
PATH = (0, 1, 4, 7)


def _attention(setting: Setting) -> Iterator[Finding]:
    """A path as a tree among others, as a chunk, and token by token; over the edge of a split."""
    heads, kv_heads, size, page_size = (4, 2, 16, 4) if setting.tiny else (32, 8, 128, 16)
    blocks = {"block": 16, "split": 32} if setting.tiny else {}
    committed = (30,) if setting.tiny else (254, 253, 700, 2046)
    shape = AttentionShape(heads, kv_heads, size, page_size, None, **blocks)
    for name, dtype in setting.dtypes.items():
        unequal = 0
        for begin in committed:
            unequal += _path_of_a_tree(setting, shape, begin, dtype)
        yield Finding(
            f"{name}, tokens of {2 * len(committed) * len(PATH)} with other bits", unequal, most=0
        )


def _path_of_a_tree(setting: Setting, shape: AttentionShape, begin: int, dtype: torch.dtype) -> int:
    """Tokens whose bits differ when their path is a chunk, or when each is alone."""
    page_size, kv_heads, size = shape.page_size, shape.num_kv_heads, shape.head_dim
    num_pages = -(-(begin + len(PARENTS)) // page_size)
    table = torch.randperm(num_pages).tolist()
    other = [num_pages, num_pages + 1]
    kv = setting.poisoned(num_pages + 2, 2, kv_heads, page_size, size, dtype=dtype)
    slots_S = torch.arange(begin + len(PARENTS))
    pages, places = torch.tensor(table)[slots_S // page_size], slots_S % page_size
    by_slot = kv.movedim(3, 1)
    by_slot[pages, places] = setting.random(len(slots_S), 2, kv_heads, size, dtype=dtype)
    by_slot[other] = setting.random(2, page_size, 2, kv_heads, size, dtype=dtype)
    q_TX = setting.random(len(PARENTS) + 1, shape.num_heads * size, dtype=dtype)
    rows = [
        RowSpan(0, len(PARENTS), table, begin, PARENTS),
        RowSpan(len(PARENTS), len(PARENTS) + 1, other, page_size),
    ]
    tree_TX = AttentionStep(setting, rows, shape).run(q_TX, kv)[list(PATH)]
    # The path's keys and values behind the committed ones, as a chain has them.
    source, target = [begin + node for node in PATH], [begin + i for i in range(len(PATH))]
    by_slot[pages[target], places[target]] = by_slot[pages[source], places[source]]
    chunk = [RowSpan(0, len(PATH), table, begin)]
    q_PX = q_TX[list(PATH)]
    chunk_TX = AttentionStep(setting, chunk, shape).run(q_PX, kv)
    alone = [
        AttentionStep(setting, [RowSpan(0, 1, table, begin + i)], shape).run(q_PX[i : i + 1], kv)
        for i in range(len(PATH))
    ]
    return unequal_rows(chunk_TX, tree_TX) + unequal_rows(torch.cat(alone), tree_TX)


def _lora(setting: Setting) -> Iterator[Finding]:
    """A stack alone, and in a batch at another place."""
    shapes = replace(setting.mistral, num_layers=1)
    for name, dtype in setting.dtypes.items():
        adapters = [
            random_lora(shapes, dtype, setting.device, rank=rank) for rank in (16, 40, 8, 5)
        ]
        loras = [LoraWeights.from_buffer(each.buffer, each.layout) for each in adapters]
        alone = LoraStep(setting, shapes, [(0, 3, loras[0], 1.0), (0, 3, loras[1], 0.5)], 3)
        uses = [(0, 21, loras[2], 1.0), (23, 26, loras[0], 1.0), (23, 26, loras[1], 0.5),
                (26, 27, loras[3], 1.0)]  # fmt: skip
        batch, unequal = LoraStep(setting, shapes, uses, 27), 0
        for group, targets in enumerate(GROUPS):
            x_TI = setting.random(27, shapes.target_shape(targets[0])[1], dtype=dtype)
            expected_TO = alone.deltas(x_TI[23:26].contiguous(), group)
            unequal += unequal_rows(batch.deltas(x_TI, group)[23:26], expected_TO)
        yield Finding(f"{name}, rows of {3 * len(GROUPS)} with other bits", unequal, most=0)


def _steps(setting: Setting) -> Iterator[Finding]:
    """Logits of a prompt at once and alone; then in pieces among others, the last a tree.

    Each several times, so that on a device the later ones are replayed graphs.
    """
    shapes = setting.small
    vocab = shapes.vocab_size
    times = 1 if setting.tiny else 4
    for name, dtype in setting.dtypes.items():
        backend = random_backend(shapes, dtype, setting.device)
        targets = LAYER_TARGETS if setting.tiny else (*LAYER_TARGETS, LM_HEAD)
        adapters = [
            random_lora(shapes, dtype, setting.device, rank=rank, targets=targets)
            for rank in (5, 16)
        ]
        loras = [LoraWeights.from_buffer(each.buffer, each.layout) for each in adapters]
        stack, pages, ids = ((0, 0.5), (1, 1.5)), [9, 4, 6, 8], _ids(12, vocab)
        kv = backend.make_kv(40, 4)
        kv.data.fill_(torch.nan)
        (alone_TV,) = run(backend, loras, kv, [RowPart(ids, 0, pages, stack)])
        alone_TV = alone_TV.clone()
        others = [
            RowPart(_ids(3 if setting.tiny else 20, vocab), 0, range(20, 26), ((0, 1.0),)),
            RowPart(_ids(1, vocab), 0, [30]),
        ]
        wrong = _ids(3, vocab)
        tree = [ids[9], wrong[0], wrong[1], ids[10], wrong[2], ids[11]]
        parents = (-1, 0, 0, 0, 3, 3)
        pieces: list[tuple[list[RowPart], RowPart, Sequence[int]]] = [
            ([], RowPart(ids[:5], 0, pages, stack), range(5)),
            (others, RowPart(ids[5:6], 5, pages, stack), range(1)),
            (others[1:], RowPart(ids[6:9], 6, pages, stack), range(3)),
            (others[:1], RowPart(tree, 9, pages, stack, parents), (0, 3, 5)),
        ]
        unequal = 0
        for _ in range(times):
            kv.data.fill_(torch.nan)
            done = 0
            for beside, mine, nodes in pieces:
                found_TV = run(backend, loras, kv, [*beside, mine])[-1][list(nodes)]
                unequal += unequal_rows(found_TV, alone_TV[done : done + len(nodes)])
                kv.move([Move(pages, [done + i for i in nodes], range(done, done + len(nodes)))])
                done += len(nodes)
        yield Finding(f"{name}, tokens of {times * 12} with other bits", unequal, most=0)


def _ids(count: int, vocab: int) -> list[int]:
    ids: list[int] = torch.randint(4, vocab, (count,)).tolist()
    return ids


def _repeats(setting: Setting) -> Iterator[Finding]:
    """Beside products on another stream, which are more work than the steps themselves."""
    shapes, unequal, beside = setting.small, 0, 0
    backend = random_backend(shapes, torch.bfloat16, setting.device)
    kv = backend.make_kv(400, 16)
    kv.data.fill_(torch.nan)
    parts = [
        RowPart(_ids(9 + row, shapes.vocab_size), 0, [3 * row, 3 * row + 1]) for row in range(8)
    ]
    expected_TV = torch.cat(run(backend, [], kv, parts)).clone()
    a = setting.random(4096, 4096, dtype=torch.bfloat16)
    stream = torch.cuda.Stream(setting.device)
    for _ in range(REPEATS):
        with torch.cuda.stream(stream):
            for _ in range(LOAD):
                torch.mm(a, a)
        unequal += unequal_rows(torch.cat(run(backend, [], kv, parts)), expected_TV)
        beside += not stream.query()
    stream.synchronize()
    yield Finding(f"steps of {REPEATS} that ended beside other work", beside, least=REPEATS // 2)
    yield Finding(f"rows of {REPEATS * len(expected_TV)} with other bits", unequal, most=0)


def _cublas(setting: Setting) -> Iterator[Finding]:
    """What a library that chooses by the number of tokens does; nothing is expected of it."""
    for name, weight in _weights(setting).items():
        if weight.kind or weight.values.dtype == torch.float32:
            continue
        x_TI = setting.random(max(TOKENS), weight.num_inputs, dtype=torch.bfloat16)
        alone = linear(x_TI[:1], weight.values)
        others = sum(
            not torch.equal(linear(x_TI[:count], weight.values)[:1], alone) for count in TOKENS[1:]
        )
        yield Finding(f"{name}, numbers of tokens of {len(TOKENS) - 1} with other bits", others)
        rows = torch.randperm(64, device=setting.device)
        block_TO = linear(x_TI[:64], weight.values)
        permuted = unequal_rows(linear(x_TI[:64][rows], weight.values), block_TO[rows])
        yield Finding(f"{name}, rows of 64 with other bits when permuted", permuted)
