"""Speed of kernels on Mistral-7B's shapes, beside what a copy reaches and what cuBLAS does.

What calls read in turn is more than caches hold. All calls of a timing are one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu.clock import bandwidth, num_copies, seconds_of
from benchmarks.gpu.compare import AttentionStep, LoraStep
from benchmarks.gpu.decoding import PAGE, decoding, num_pages
from benchmarks.gpu.models import random_heads, random_lora, random_private
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.right_samples import SAMPLINGS, Draw, pairs_of
from benchmarks.gpu.setting import Setting
from lorastack.kernels.quantize import Kind
from lorastack.kernels.sample import Sample
from lorastack.kernels.triton import heads as heads_kernels
from lorastack.kernels.triton import matmul as module
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.top import top
from lorastack.kernels.triton.weight import Weight, pack_weight
from lorastack.layout import GROUPS, LM_HEAD, ModelShapes
from lorastack.lora.weights import LoraWeights
from lorastack.model.kv import page_nbytes
from lorastack.request import SamplingParams

DTYPE = torch.bfloat16
TOKENS = (1, 8, 16, 32, 64, 128)
GOAL, GOAL_TOKENS = 85, 64  # percent of what a copy reaches, up to so many tokens
# Inputs and stages of a program, to be tried at 8 and 64 tokens.
CANDIDATES = ((64, 4), (64, 6), (128, 3), (128, 4), (128, 5), (256, 3))
CANDIDATE_TOKENS = (8, 64)


def cases(setting: Setting) -> Cases:
    """By kernel."""
    speed = cache(partial(bandwidth, setting))
    matrices = matrices_of(setting.mistral)
    kinds: Cases = {
        f"matmul {name}": partial(_matmul, setting, speed, *shape)
        for name, shape in matrices.items()
    }
    kinds |= {
        f"matmul down_proj {kind}": partial(_quantised, setting, speed, kind) for kind in Kind
    }
    kinds |= {
        "matmul, inputs and stages": partial(_candidates, setting, speed),
        "LoRA": partial(_lora, setting, speed),
        "attention": partial(_attention, setting, speed),
        "samples": partial(_samples, setting),
        "heads": partial(_heads, setting, speed),
    }
    return kinds


def matrices_of(shapes: ModelShapes) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each product of a step."""
    return {
        "+".join(targets): (
            sum(shapes.target_shape(target)[0] for target in targets),
            shapes.target_shape(targets[0])[1],
        )
        for targets in (*GROUPS, (LM_HEAD,))
    }


def _weights(setting: Setting, outputs: int, inputs: int, kind: Kind | None = None) -> list[Weight]:
    """Enough of them that none is read from a cache."""
    first = pack_weight(setting.random(outputs, inputs, dtype=DTYPE), kind=kind)
    count = num_copies(setting, first.values.nbytes)
    return [first, *(replace(first, values=first.values.clone()) for _ in range(count - 1))]


def _seconds(setting: Setting, weights: list[Weight], count: int) -> float:
    """Of a product of so many tokens."""
    weight = weights[0]
    x_TI = setting.random(count, weight.num_inputs, dtype=DTYPE)
    shape = (weight.plan.num_parts(count), count, weight.num_outputs)
    parts_CTO, num_tokens = setting.poisoned(*shape), setting.ints(count)
    calls = [partial(module.matmul, x_TI, each, parts_CTO, num_tokens) for each in weights]
    return seconds_of(calls)


def _percent(weight: Weight, seconds: float, bytes_a_second: float) -> float:
    scales = 0 if weight.scales is None else weight.scales.nbytes
    return 100 * (weight.values.nbytes + scales) / seconds / bytes_a_second


def _matmul(
    setting: Setting, speed: Callable[[], float], outputs: int, inputs: int
) -> Iterator[Finding]:
    weights = _weights(setting, outputs, inputs)
    for count in (1, 3) if setting.tiny else TOKENS:
        least = setting.goal(GOAL) if count <= GOAL_TOKENS else None
        percent = _percent(weights[0], _seconds(setting, weights, count), speed())
        yield Finding(f"{count} tokens", percent, "% of a copy", least=least)
        x_TI = setting.random(count, inputs, dtype=DTYPE)
        seconds = seconds_of([partial(linear, x_TI, each.values) for each in weights])
        percent = _percent(weights[0], seconds, speed())
        yield Finding(f"{count} tokens, cuBLAS", percent, "% of a copy")


def _quantised(setting: Setting, speed: Callable[[], float], kind: Kind) -> Iterator[Finding]:
    weights = _weights(setting, *setting.mistral.target_shape("down_proj"), kind)
    for count in (3,) if setting.tiny else (8, 64):
        percent = _percent(weights[0], _seconds(setting, weights, count), speed())
        yield Finding(f"{count} tokens", percent, "% of a copy")


def candidates() -> Iterator[tuple[str, int, Any]]:
    """Words, tokens, and the function that chooses these blocks."""
    plain = module.blocks_of
    for count in CANDIDATE_TOKENS:
        for inputs, stages in CANDIDATES:

            def chosen(
                weight: Weight, bucket: int, inputs: int = inputs, stages: int = stages
            ) -> Any:
                return plain(weight, bucket)._replace(inputs=inputs, stages=stages)

            yield f"{count} tokens, {inputs} inputs, {stages} stages", count, chosen


def _candidates(setting: Setting, speed: Callable[[], float]) -> Iterator[Finding]:
    """Of the matrix that is largest. One that does not fit is left out."""
    weights = _weights(setting, *matrices_of(setting.mistral)["gate_proj+up_proj"])
    left_out = []
    for words, count, chosen in islice(candidates(), 1 if setting.tiny else None):
        with patch.object(module, "blocks_of", chosen):
            try:
                seconds = _seconds(setting, weights, count)
            except Exception as error:  # of shared memory, by whatever name
                if setting.is_broken():
                    raise
                left_out.append(f"{words}: {error}"[:200])
                continue
        yield Finding(words, _percent(weights[0], seconds, speed()), "% of a copy")
    setting.notes["blocks that do not fit"] = left_out


def _lora(setting: Setting, speed: Callable[[], float]) -> Iterator[Finding]:
    """Eight rows, each with a LoRA of rank 16 of its own; all four groups of a layer."""
    layers = 1 if setting.tiny else 8  # that take turns
    shapes = replace(setting.mistral, num_layers=layers)
    adapters = [random_lora(shapes, DTYPE, setting.device) for _ in range(8)]
    loras = [LoraWeights.from_buffer(each.buffer, each.layout) for each in adapters]
    step = LoraStep(setting, shapes, [(i, i + 1, each, 1.0) for i, each in enumerate(loras)], 8)
    calls = []
    for layer in range(layers):
        for group, targets in enumerate(GROUPS):
            x_TI = setting.random(8, shapes.target_shape(targets[0])[1], dtype=DTYPE)
            delta_TO = setting.poisoned(8, sum(step.outputs(group)))
            calls.append(partial(step.add, x_TI, group, delta_TO, layer))
    seconds = len(GROUPS) * seconds_of(calls)
    nbytes = sum(each.buffer.nbytes for each in adapters) / layers
    yield Finding("8 LoRAs of rank 16, a layer", 1e6 * seconds, "us")
    yield Finding("8 LoRAs of rank 16, a layer", 100 * nbytes / seconds / speed(), "% of a copy")


def _attention(setting: Setting, speed: Callable[[], float]) -> Iterator[Finding]:
    shapes = setting.mistral
    shape = AttentionShape(shapes.num_heads, shapes.num_kv_heads, shapes.head_dim, PAGE, None)
    loads = ((9, 1), (9, 2)) if setting.tiny else ((512, 1), (2048, 1), (8192, 1), (2048, 8))
    for past, nodes in loads:
        batch = decoding(shapes, 8, past, nodes=nodes)
        step = AttentionStep(setting, batch.rows, shape)
        size = (num_pages(batch), 2, shapes.num_kv_heads, PAGE, shapes.head_dim)
        first = setting.random(*size, dtype=DTYPE)
        caches = [first, *(first.clone() for _ in range(num_copies(setting, first.nbytes) - 1))]
        q_TX = setting.random(8 * nodes, shapes.num_heads * shapes.head_dim, dtype=DTYPE)
        out_TX = torch.empty_like(q_TX)
        seconds = seconds_of([partial(step.write, q_TX, each, out_TX) for each in caches])
        words = f"8 rows of {nodes} tokens behind {past}"
        yield Finding(words, 1e6 * seconds, "us a layer")
        nbytes = 8 * (past + nodes) * page_nbytes(shapes, 1, DTYPE) / shapes.num_layers
        yield Finding(words, 100 * nbytes / seconds / speed(), "% of a copy")


def _samples(setting: Setting) -> Iterator[Finding]:
    for rows in (2,) if setting.tiny else (8, 64):
        logits_XV = 3 * setting.random(rows, setting.mistral.vocab_size)
        for sampling in SAMPLINGS:
            samples = [Sample(row, SamplingParams(seed=row, **sampling), 1) for row in range(rows)]
            call = Draw(setting, logits_XV, samples)
            words = ", ".join(f"{name} {value}" for name, value in sampling.items())
            yield Finding(f"{rows} rows, {words or 'greedy'}", 1e6 * seconds_of([call]), "us")


def _heads(setting: Setting, speed: Callable[[], float]) -> Iterator[Finding]:
    """Eight rows with four heads each that choose from 4,096 tokens, of one adapter or of eight, or
    of one with eight private parts."""
    shapes, num = setting.mistral, 8
    hidden_XH = setting.random(8, shapes.hidden_size, dtype=DTYPE)
    ends_B: Tensor = setting.ints(*range(8))
    make = partial(random_heads, shapes, DTYPE, setting.device)
    shared = make()
    kinds = {
        "heads of 1": [(shared, list(range(8)))],
        "heads of 8": [(make(), [i]) for i in range(8)],
        "heads of 1, 8 private parts": [
            (replace(shared, private=random_private(shapes, DTYPE, setting.device, 4, 1, 16)), [i])
            for i in range(8)
        ],
    }
    if setting.tiny:
        del kinds["heads of 1"]
    for kind, groups in kinds.items():
        pairs, layout = pairs_of(setting, groups)
        rows, size = len(layout.tree_Y), max(layout.num_outputs_Y)
        r_LYH = setting.poisoned(1, rows, shapes.hidden_size, dtype=DTYPE)
        logits_YN = setting.random(rows, size)
        ids_YR = torch.zeros(rows, num, dtype=torch.int32, device=setting.device)
        logprobs_YR = setting.poisoned(rows, num)
        states = partial(
            heads_kernels.states, hidden_XH, ends_B, pairs, r_LYH,
            len(layout.states), 1, layout.max_rank,
        )  # fmt: skip
        logits = partial(heads_kernels.logits, r_LYH, pairs, logits_YN, len(layout.outputs))
        best = partial(top, logits_YN, pairs, ids_YR, logprobs_YR, rows)
        for name, call in (("states", states), ("logits", logits), ("candidates", best)):
            yield Finding(f"{name}, {kind}", 1e6 * seconds_of([call]), "us")
