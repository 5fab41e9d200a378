"""Whole steps of a random Mistral-7B: time beside what its bytes take, launches, copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.gpu.clock import bandwidth, host_seconds
from benchmarks.gpu.decoding import PAGE, counted_launches, counting, decoding, num_pages
from benchmarks.gpu.models import packing_of, random_heads, random_lora, random_weights
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting
from lorastack.kernels.heads import HeadsWeights
from lorastack.kernels.triton.weight import Weight
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.triton.backend import TritonBackend
from lorastack.model.kv import KVCache, page_nbytes
from lorastack.model.weights import DecoderWeights
from tests.helpers.native import config_of

DTYPE = torch.bfloat16
MAX_ROWS, RANK = 32, 16
MAX_COPIES = 2  # a step
MAX_LAUNCHES = {False: 350, True: 650}  # without LoRAs and with, at 32 layers
UNTIL_GRAPH = 4  # uses


@dataclass(frozen=True, slots=True)
class Load:
    """What a step has. goal: of the floor, percent. milliseconds: expected at most, of an H200.

    profiled: its kernels are noted.
    """

    rows: int
    nodes: int = 1
    loras: int = 0
    heads: bool = False
    goal: float | None = None
    milliseconds: float | None = None
    profiled: bool = False


LOADS = {
    "1 row": Load(1),
    "8 rows": Load(8, goal=65, milliseconds=5.4, profiled=True),
    "8 rows, 8 LoRAs": Load(8, loras=8, goal=55, milliseconds=6, profiled=True),
    "8 rows of 8 nodes, heads": Load(8, nodes=8, heads=True),
    "32 rows": Load(32),
}
TINY_LOADS = {
    "1 row": Load(1),
    "2 rows of 3 nodes, 2 LoRAs, heads": Load(2, nodes=3, loras=2, heads=True),
}


def cases(setting: Setting) -> Cases:
    """By load. The model is made when the first of them runs."""
    model = cache(partial(Model, setting))
    loads = TINY_LOADS if setting.tiny else LOADS
    return {name: partial(_run, model, name, load) for name, load in loads.items()}


class Model:
    """The weights once, in a backend that replays graphs and in one that launches every kernel."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.shapes = setting, setting.mistral
        self.past = 9 if setting.tiny else 1000
        device, config = setting.device, config_of(self.shapes)
        self.weights = random_weights(config, DTYPE, device, packing_of())
        self.backend = TritonBackend(config, self.weights, device, DTYPE)
        calls, self.copies = counting(device)
        self.plain = TritonBackend(config, self.weights, device, DTYPE, None, calls)
        rows = 2 if setting.tiny else MAX_ROWS
        self.kv = self.cache(rows, self.past)
        self.adapters = [
            random_lora(self.shapes, DTYPE, device, rank=RANK)
            for _ in range(2 if setting.tiny else 8)
        ]
        self.loras = [LoraWeights.from_buffer(each.buffer, each.layout) for each in self.adapters]
        self.heads = random_heads(self.shapes, DTYPE, device)
        self.bytes_a_second = bandwidth(setting)

    def cache(self, rows: int, past: int) -> KVCache:
        """Random keys and values."""
        pages = num_pages(decoding(self.shapes, rows, past, nodes=8))
        kv = self.backend.make_kv(pages, PAGE)
        kv.data.normal_()
        return kv

    def floor(self, load: Load) -> float:
        """Seconds that the step's bytes take to read."""
        nbytes = weights_nbytes(self.weights)
        nbytes += load.rows * self.past * page_nbytes(self.shapes, 1, DTYPE)
        nbytes += sum(each.buffer.nbytes for each in self.adapters[: load.loras])
        if load.heads:
            nbytes += heads_nbytes(self.heads)
        return nbytes / self.bytes_a_second


def weights_nbytes(weights: DecoderWeights[Weight]) -> int:
    """Of all that a step reads whole."""
    dense = [weights.lm_head]
    for layer in weights.layers:
        dense += [layer.qkv, layer.o, layer.gate_up, layer.down]
    return sum(
        each.values.nbytes + (0 if each.scales is None else each.scales.nbytes) for each in dense
    )


def heads_nbytes(heads: HeadsWeights) -> int:
    tensors: Sequence[Tensor | None] = (heads.weight_LKHH, heads.output)
    return sum(each.nbytes for each in tensors if each is not None)


def _run(model: Callable[[], Model], name: str, load: Load) -> Iterator[Finding]:
    made = model()
    batch = decoding(
        made.shapes,
        load.rows,
        made.past,
        nodes=load.nodes,
        loras=made.loras[: load.loras],
        heads=made.heads if load.heads else None,
    )
    made.plain.forward(batch, made.kv)  # makes tables
    made.copies.clear()
    with counted_launches() as launches:
        outputs = made.plain.forward(batch, made.kv)
    wrong = int((~outputs.logits_XV.isfinite()).sum())
    yield Finding("logits that are not finite", wrong, most=0)
    yield Finding("copies", made.copies.total(), "a step", most=MAX_COPIES)
    most = None if made.setting.tiny else MAX_LAUNCHES[load.loras > 0]
    yield Finding("launches", launches.total(), "a step", most=most)
    few, many = (1, 1) if made.setting.tiny else (5, 20)
    plain = host_seconds(lambda: made.plain.forward(batch, made.kv), few)
    for _ in range(UNTIL_GRAPH if made.setting.on_device else 0):
        made.backend.forward(batch, made.kv)
    times = host_seconds(lambda: made.backend.forward(batch, made.kv), many)
    median, floor = times[len(times) // 2], made.floor(load)
    most = load.milliseconds if "H200" in made.setting.name else None
    yield Finding("as a graph", 1000 * median, "ms a step", most=most)
    least = made.setting.goal(load.goal)
    yield Finding("of the floor", 100 * floor / median, "%", least=least)
    yield Finding("the floor", 1000 * floor, "ms")
    yield Finding("kernel by kernel", 1000 * plain[len(plain) // 2], "ms a step")
    if load.profiled:
        call = partial(made.backend.forward, batch, made.kv)
        try:
            made.setting.notes[f"kernels of {name}"] = profile(call)
        except RuntimeError as error:  # not every machine lets itself be profiled
            made.setting.notes[f"kernels of {name}"] = [str(error)]


def profile(call: Callable[[], object], steps: int = 3, most: int = 20) -> list[str]:
    """The kernels that take longest: microseconds and launches a step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    averages = sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total)
    return [
        f"{each.self_device_time_total / steps:.1f} us, {each.count / steps:.1f}: {each.key[:80]}"
        for each in averages[:most]
    ]
