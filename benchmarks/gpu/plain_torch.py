"""The same steps in plain torch, with cuDNN's attention and without it: what there is to win.

Rows grow by a token a step, as cuDNN makes a plan for each length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from benchmarks.gpu.clock import host_seconds
from benchmarks.gpu.decoding import PAGE, decoding, num_pages
from benchmarks.gpu.models import random_lora, random_weights
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.steps import DTYPE, RANK, Load
from lorastack.kernels.linear import pack_dense
from lorastack.kernels.ops import Ops
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.exact import ask_for_exact_sums
from lorastack.model.backends.torch import TorchBackend
from lorastack.model.weights import Packing
from tests.helpers.native import config_of

STEPS = 10
LOADS = {"8 rows": Load(8), "8 rows, 8 LoRAs": Load(8, loras=8), "8 rows of 8 nodes": Load(8, 8)}


class Model:
    """In plain torch."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.shapes = setting, setting.mistral
        self.past = 9 if setting.tiny else 1000
        ask_for_exact_sums()  # as where it is served
        config = config_of(self.shapes)
        packing = Packing(pack_dense, pair=pack_dense, head=pack_dense, copies=False)
        weights = random_weights(config, DTYPE, setting.device, packing)
        self.backend = TorchBackend(config, weights, setting.device, DTYPE, Ops())
        longest = decoding(self.shapes, 8, self.past + 2 * STEPS, nodes=8)
        self.kv = self.backend.make_kv(num_pages(longest), PAGE)
        self.kv.data.zero_()
        adapters = [random_lora(self.shapes, DTYPE, setting.device, rank=RANK) for _ in range(8)]
        self.loras = [LoraWeights.from_buffer(each.buffer, each.layout) for each in adapters]


def cases(setting: Setting) -> Cases:
    """By load."""
    model = cache(partial(Model, setting))
    return {name: partial(_run, model, load) for name, load in LOADS.items()}


def _run(model: Callable[[], Model], load: Load) -> Iterator[Finding]:
    made = model()
    steps = 2 if made.setting.tiny else STEPS

    def step(grown: int) -> None:
        loras = made.loras[: load.loras]
        batch = decoding(made.shapes, load.rows, made.past + grown, nodes=load.nodes, loras=loras)
        made.backend.forward(batch, made.kv)

    step(0)
    if made.setting.on_device:
        yield Finding("waits for the device", _waits(partial(step, 0)), "a step")
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        lengths = iter(range(1, steps + 1))
        times = host_seconds(lambda: step(next(lengths)), steps)  # noqa: B023
        words = "with" if cudnn else "without"
        yield Finding(f"{words} cuDNN, median", 1000 * times[steps // 2], "ms a step")
        yield Finding(f"{words} cuDNN, longest", 1000 * times[-1], "ms a step")


def _waits(call: Callable[[], object]) -> int:
    """How often the host waits, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)
