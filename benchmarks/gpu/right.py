"""Right or wrong: every kernel of a step against float64, from fresh numbers, into memory of NaN.

`right_samples` has those behind the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import right_samples
from benchmarks.gpu.compare import (
    AttentionStep,
    LoraStep,
    check_equal,
    check_untouched,
    error_of,
    products,
)
from benchmarks.gpu.models import random_lora
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.right_samples import EXACT
from benchmarks.gpu.setting import DTYPES, Setting
from lorastack.kernels.attention import attend_reference
from lorastack.kernels.quantize import Kind
from lorastack.kernels.segmented_lora import segmented_lora_reference
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.pointwise import (
    Projection,
    Rotations,
    add_norm,
    add_parts,
    embed,
    gather_norm,
    rope_write,
    silu_mul,
    turn,
)
from lorastack.kernels.triton.weight import pack_weight
from lorastack.layout import EMBED, GROUPS, ModelShapes
from lorastack.lora.weights import LoraWeights
from lorastack.model.context import RowSpan

ROUNDED = {torch.float32: EXACT, torch.bfloat16: 1e-2}  # of results in a dtype
EPS = 1e-5


def cases(setting: Setting) -> Cases:
    """By kernel."""
    kernels: dict[str, Callable[[Setting], Iterator[Finding]]] = {
        "matmul": _matmul,
        "LoRA": _lora,
        "attention": _attention,
        "norms": _norms,
        "RoPE": _rope,
        "dynamic RoPE": _turn,
        "embedding, SiLU, sums": _pointwise,
    }
    return {name: partial(run, setting) for name, run in kernels.items()} | right_samples.cases(
        setting
    )


def _matmul(setting: Setting) -> Iterator[Finding]:
    shapes = [(6144, 4096, 8), (4096, 14336, 64), (1000, 3000, 130)]
    if setting.tiny:
        shapes = [(70, 200, 17)]
    for name, dtype in DTYPES.items():
        # Codes are widened to bfloat16 alone.
        for kind in (None, *Kind) if dtype == torch.bfloat16 else (None,):
            worst = 0.0
            for outputs, inputs, count in shapes:
                dense_OI = setting.random(outputs, inputs, dtype=dtype)
                weight = pack_weight(dense_OI, kind=kind)
                x_TI = setting.random(count, inputs, dtype=dtype)
                found_TO = products(setting, x_TI, weight, count + 3)
                meant_OI = weight.rows(torch.arange(outputs, device=setting.device))
                worst = max(worst, error_of(found_TO, x_TI.double() @ meant_OI.double().t()))
            yield Finding(f"{name}, {kind or 'plain'} weights", worst, "relative error", most=EXACT)


def _lora(setting: Setting) -> Iterator[Finding]:
    """Ranks of several sizes, a stack, tokens without, a segment of more than one tile."""
    shapes = replace(setting.mistral, num_layers=1)
    some = ("k_proj", "up_proj", "down_proj")
    for name, dtype in DTYPES.items():
        make = partial(random_lora, shapes, dtype, setting.device)
        adapters = [make(rank=16), make(rank=5), make(rank=33, targets=some)]
        loras = [LoraWeights.from_buffer(each.buffer, each.layout) for each in adapters]
        uses = [(0, 18, loras[0], 1.0), (19, 21, loras[1], -0.5), (21, 22, loras[1], 0.5),
                (21, 22, loras[2], 2.0), (23, 24, loras[2], 1.0)]  # fmt: skip
        step = LoraStep(setting, shapes, uses, 25)
        worst = 0.0
        for group, targets in enumerate(GROUPS):
            inputs = shapes.target_shape(targets[0])[1]
            x_TI = setting.random(25, inputs, dtype=dtype)
            found_TO = step.deltas(x_TI, group)
            for token in (18, 22, 24):  # without LoRAs
                check_untouched(found_TO[token])
            segments = [
                (start, end, scale, each.groups[0, group])
                for start, end, each, scale in uses
                if (0, group) in each.groups
            ]
            expected_TO = torch.zeros_like(found_TO)
            outs = expected_TO.split_with_sizes(step.outputs(group), dim=1)
            segmented_lora_reference(x_TI, outs, segments)
            adapted_T = step.arrays.adapted_T.bool()
            worst = max(worst, error_of(found_TO[adapted_T], expected_TO[adapted_T]))
        yield Finding(name, worst, "relative error", most=ROUNDED[dtype])
        error = _embedding_error(setting, shapes, dtype)
        yield Finding(f"{name}, embed_tokens", error, "relative error", most=ROUNDED[dtype])


def _embedding_error(setting: Setting, shapes: ModelShapes, dtype: torch.dtype) -> float:
    """Of what a LoRA adds to embedded tokens; a token without stays as it is."""
    adapter = random_lora(shapes, dtype, setting.device, rank=9, targets=(EMBED,))
    weights = LoraWeights.from_buffer(adapter.buffer, adapter.layout)
    lora = weights.embedding
    assert lora is not None
    step = LoraStep(setting, shapes, [(0, 3, weights, 0.5)], 4)
    ids_T, hidden_TH = setting.ints(5, 0, 5, 7), setting.random(4, shapes.hidden_size)
    found_TH = hidden_TH.clone()
    step.add_embedding(ids_T, found_TH, dtype)
    check_equal(found_TH[3], hidden_TH[3])
    columns_TR = lora.a_RV.t()[ids_T[:3].long()].double()
    expected_TH = hidden_TH[:3].double() + 0.5 * lora.scale * columns_TR @ lora.b_HR.double().t()
    return error_of(found_TH[:3], expected_TH)


def rows_of_attention(tiny: bool, page_size: int) -> list[RowSpan]:
    """A single token, a tree, a chunk and a chunk at the beginning, on shuffled pages."""
    lengths = (37, 21, 9, 0) if tiny else (1500, 700, 300, 0)
    parents = (-1, 0, 0, 1, 1, 3, 2, 6)
    rows, start, page = [], 0, 1
    for length, count in zip(lengths, (1, len(parents), 5, 3), strict=True):
        num_pages = -(-(length + count) // page_size)
        table = [page + 2 * i for i in reversed(range(num_pages))]  # every other one is foreign
        is_tree = count == len(parents)
        rows.append(RowSpan(start, start + count, table, length, parents if is_tree else None))
        start, page = start + count, page + 2 * num_pages
    return rows


def fill_rows(setting: Setting, kv: Tensor, rows: list[RowSpan]) -> None:
    """Random keys and values in the slots that are the rows' own. kv: one layer's."""
    page_size = kv.shape[3]
    for row in rows:
        for index in range(-(-row.num_slots // page_size)):
            used = min(page_size, row.num_slots - index * page_size)
            place = kv[row.block_table[index], :, :, :used]
            place.copy_(setting.random(*place.shape, dtype=kv.dtype))


def _attention(setting: Setting) -> Iterator[Finding]:
    """Pages of others, and what rows do not use of theirs, are NaN."""
    kinds = [(32, 8, 128, None), (32, 8, 128, 512), (9, 3, 64, None), (4, 4, 24, None)]
    if setting.tiny:
        kinds = [(6, 2, 16, None), (4, 1, 24, 9)]
    for name, dtype in DTYPES.items():
        worst = 0.0
        for heads, kv_heads, size, window in kinds:
            page_size = 4 if setting.tiny else 16
            shape = AttentionShape(heads, kv_heads, size, page_size, window)
            rows = rows_of_attention(setting.tiny, page_size)
            pages = 2 + max(max(row.block_table) for row in rows)
            kv = setting.poisoned(pages, 2, kv_heads, page_size, size, dtype=dtype)
            fill_rows(setting, kv, rows)
            q_TX = setting.random(rows[-1].end, heads * size, dtype=dtype)
            found_TX = AttentionStep(setting, rows, shape).run(q_TX, kv)
            q_THD = q_TX.view(-1, heads, size)
            expected_TX = attend_reference(q_THD, kv, rows, window)
            worst = max(worst, error_of(found_TX.cpu(), expected_TX))
        yield Finding(name, worst, "relative error", most=ROUNDED[dtype])


class _Projected:
    """A product of two parts with a bias, and LoRAs' part at every other token."""

    def __init__(self, setting: Setting, bucket: int, size: int) -> None:
        adapted_T = (torch.arange(bucket, device=setting.device) % 2).int()
        bias_O, lora_TO = setting.random(size), setting.random(bucket, size)
        parts_CTO = setting.random(2, bucket, size)
        lora_TO[adapted_T == 0] = torch.nan
        added_TO = torch.where(adapted_T[:, None] == 0, 0.0, lora_TO).double()
        self.sums_TO = parts_CTO.double().sum(0) + bias_O + added_TO
        self.projection = Projection(parts_CTO, bias_O, lora_TO, adapted_T)


def _norms(setting: Setting) -> Iterator[Finding]:
    state = 0.0
    for name, dtype in DTYPES.items():
        worst = 0.0
        for size in (48, 100) if setting.tiny else (4096, 576, 1000):
            bucket, count = 5, 4
            projected = _Projected(setting, bucket, size)
            hidden_TH, norm_H = setting.random(bucket, size), setting.random(size, dtype=dtype)
            expected_TH = hidden_TH[:count].double() + projected.sums_TO[:count]
            scale_T1 = (expected_TH.square().mean(1, keepdim=True) + EPS).rsqrt()
            normed_TH = expected_TH * scale_T1 * norm_H
            places = [1, 3]
            x_XH = setting.poisoned(2, size, dtype=dtype)
            wanted = setting.ints(*places)
            gather_norm(projected.projection, hidden_TH, wanted, norm_H, x_XH, setting.ints(2), EPS)
            worst = max(worst, error_of(x_XH, normed_TH[places]))
            x_TH = setting.poisoned(bucket, size, dtype=dtype)
            add_norm(projected.projection, hidden_TH, norm_H, x_TH, setting.ints(count), EPS)
            check_untouched(x_TH[count:])
            worst = max(worst, error_of(x_TH[:count], normed_TH))
            state = max(state, error_of(hidden_TH[:count], expected_TH))
        yield Finding(name, worst, "relative error", most=ROUNDED[dtype])
    yield Finding("hidden states", state, "relative error", most=EXACT)


def _rope(setting: Setting) -> Iterator[Finding]:
    kinds = [(2, 1, 16)] if setting.tiny else [(32, 8, 128), (9, 3, 64), (4, 4, 24)]
    for name, dtype in DTYPES.items():
        worst = 0.0
        for heads, kv_heads, size in kinds:
            bucket, count, page_size = 6, 5, 4
            projected = _Projected(setting, bucket, (heads + 2 * kv_heads) * size)
            angle_PF = setting.random(64, size // 2)
            rotations = Rotations(angle_PF.cos(), angle_PF.sin(), setting.ints(3, 9, 9, 60, 0, 0))
            slots = [5, 17, 2, 8, 9]
            kv = setting.poisoned(6, 2, kv_heads, page_size, size, dtype=dtype)
            q_THD = setting.poisoned(bucket, heads, size, dtype=dtype)
            slots_T = setting.ints(*slots, 0)
            rope_write(projected.projection, rotations, slots_T, q_THD, kv, setting.ints(count))
            by_head = projected.sums_TO[:count].view(count, -1, size)
            angle = angle_PF[rotations.rows_T[:count].long()].double()[:, None]
            first, second = by_head.chunk(2, dim=2)
            turned = torch.cat(
                (first * angle.cos() - second * angle.sin(),
                 second * angle.cos() + first * angle.sin()), dim=2
            )  # fmt: skip
            pages, places = [slot // page_size for slot in slots], [s % page_size for s in slots]
            written = kv.movedim(3, 1)[pages, places]  # [tokens, 2, kv heads, D]
            check_untouched(q_THD[count:])
            rest = kv.clone()
            rest.movedim(3, 1)[pages, places] = torch.nan
            check_untouched(rest)
            key_end = heads + kv_heads
            errors = (
                error_of(q_THD[:count], turned[:, :heads]),
                error_of(written[:, 0], turned[:, heads:key_end]),
                error_of(written[:, 1], by_head[:, key_end:]),
            )
            worst = max(worst, *errors)
        yield Finding(name, worst, "relative error", most=ROUNDED[dtype])


def _turn(setting: Setting) -> Iterator[Finding]:
    """Cosines and sines of angles that are float32 products."""
    longest, size, bucket, count = 200 if setting.tiny else 16000, 64, 6, 5
    inv_freq_PF = torch.rand(longest, size, device=setting.device)
    positions_T, lasts_T = torch.randint(
        0, longest, (2, bucket), dtype=torch.int32, device=setting.device
    )
    cos_TF, sin_TF = setting.poisoned(bucket, size), setting.poisoned(bucket, size)
    turn(inv_freq_PF, positions_T, lasts_T, 1.5, cos_TF, sin_TF, setting.ints(count))
    rows_T = torch.maximum(positions_T, lasts_T).long()
    angle_TF = (positions_T[:, None].float() * inv_freq_PF[rows_T])[:count].double()
    worst = 0.0
    for found_TF, expected_TF in ((cos_TF, angle_TF.cos()), (sin_TF, angle_TF.sin())):
        check_untouched(found_TF[count:])
        worst = max(worst, error_of(found_TF[:count], 1.5 * expected_TF))
    yield Finding("float32", worst, "relative error", most=EXACT)


def _pointwise(setting: Setting) -> Iterator[Finding]:
    bucket, count = 5, 4
    num_tokens = setting.ints(count)
    sizes = (40,) if setting.tiny else (4096, 14336, 1000)
    for name, dtype in DTYPES.items():
        worst = 0.0
        for size in sizes:
            embed_VH = setting.random(50, size, dtype=dtype)
            hidden_TH, ids_T = setting.poisoned(bucket, size), setting.ints(7, 0, 49, 7, 0)
            embed(ids_T, embed_VH, hidden_TH, num_tokens)
            check_untouched(hidden_TH[count:])
            check_equal(hidden_TH[:count], embed_VH[ids_T[:count].long()].float())
            pair = _Projected(setting, bucket, 2 * size)
            inner_TI = setting.poisoned(bucket, size, dtype=dtype)
            silu_mul(pair.projection, inner_TI, num_tokens)
            check_untouched(inner_TI[count:])
            gate, up = pair.sums_TO[:count].chunk(2, dim=1)
            worst = max(worst, error_of(inner_TI[:count], gate * gate.sigmoid() * up))
            out_TO = setting.poisoned(bucket, 2 * size)
            add_parts(pair.projection, out_TO, num_tokens)
            check_untouched(out_TO[count:])
            worst = max(worst, error_of(out_TO[:count], pair.sums_TO[:count]))
        yield Finding(name, worst, "relative error", most=ROUNDED[dtype])
