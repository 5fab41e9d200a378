"""Compiles every kernel that the other stages launch, in many processes at once.

All walk through the same launches, without running any, and each compiles its share into the one
TRITON_CACHE_DIR, from which the later stages take them. Registers are read where they are loaded.

    python -m benchmarks.gpu.compiling PART PARTS [--tiny]   (a share; a line of JSON a kernel)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu import bits, kernel_speed, right
from benchmarks.gpu.decoding import PAGE, counting, decoding, num_pages
from benchmarks.gpu.models import packing_of, random_heads, random_lora, random_weights
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting
from lorastack.kernels.triton.launch import INTERPRETED, OPTIONS
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.triton.backend import TritonBackend
from lorastack.model.backends.triton.inputs import BUCKETS
from tests.helpers.launches import launching
from tests.helpers.native import config_of

DTYPE = torch.bfloat16
PROCESSES = 12
MODULES = (right, bits, kernel_speed)
SAME = ("repeats under load", "cuBLAS")  # cases that launch no kernel of their own


def _once(calls: Sequence[Callable[[], object]], least_calls: int = 1) -> float:
    for call in calls:
        call()
    return 1.0


# In place of what compares and times: nothing has run.
INSTEAD: dict[str, Callable[..., object]] = {
    "error_of": lambda found, expected: 0.0,
    "check_equal": lambda found, expected: None,
    "check_untouched": lambda rest: None,
    "attend_reference": lambda q_THD, kv, rows, window: q_THD,
    "segmented_lora_reference": lambda x_TI, outs, segments: None,
    "seconds_of": _once,
    "bandwidth": lambda setting: 1.0,
    "num_copies": lambda setting, nbytes: 1,
}


def cases(setting: Setting) -> Cases:
    return {"all kernels": partial(_all, setting)}


def _all(setting: Setting) -> Iterator[Finding]:
    count = min(PROCESSES, os.cpu_count() or 1)
    began = time.monotonic()
    command, tiny = [sys.executable, "-m", __spec__.name], ["--tiny"] * setting.tiny
    begin = partial(subprocess.Popen, stdout=subprocess.PIPE, text=True)
    processes = [begin([*command, f"{part}", f"{count}", *tiny]) for part in range(count)]
    found = [json.loads(line) for each in processes for line in each.communicate()[0].splitlines()]
    failed = sum(each.wait() != 0 for each in processes)
    yield Finding("shares that failed", failed, most=0)
    by_kernel = defaultdict(list)
    for each in found:
        by_kernel[each["kernel"]].append(each)
    yield Finding("kernels", len(by_kernel), f"in {len(found)} versions", least=1)
    yield Finding("time", time.monotonic() - began, f"s, {count} processes")
    for name, versions in sorted(by_kernel.items()):
        loaded = [each for each in versions if "registers" in each]
        if loaded:
            most = max(each["registers"] for each in loaded)
            yield Finding(f"{name}, registers", most, "a thread")
            spills = sum(each["spills"] for each in loaded)
            yield Finding(f"{name}, spills", spills, "of all versions", most=0)
    setting.notes["versions"] = [json.dumps(each) for each in found]


def share(
    setting: Setting, part: int, parts: int, report: Callable[[str, Any, float], None]
) -> list[str]:
    """Compiles a share of what `walk` launches, which the interpreter cannot: there it is named.

    report: gets a kernel's name, what it was compiled to or None, and seconds. Returns what could
    not be walked.
    """
    seen: set[int] = set()

    def compile_only(kernel: Any, grid: Any, *args: object, **settings: object) -> None:
        key = zlib.crc32(repr((kernel.fn.__name__, _kinds(args), settings)).encode())
        if key in seen or key % parts != part:
            return
        seen.add(key)
        began = time.monotonic()
        made = None
        if not INTERPRETED:
            made = kernel.warmup(*args, grid=tuple(grid), **settings, **OPTIONS)
        report(kernel.fn.__name__, made, time.monotonic() - began)

    with launching(compile_only):
        return walk(setting)


def _kinds(args: tuple[object, ...]) -> list[object]:
    """What a kernel may be specialised for: dtypes and alignment, integers that are 1."""
    kinds: list[object] = []
    for each in args:
        if isinstance(each, Tensor):
            kinds.append((each.dtype, each.data_ptr() % 16 == 0))
        elif isinstance(each, int):
            kinds.append((each == 1, each % 16 == 0, each >> 31 == 0))
        else:
            kinds.append(type(each))
    return kinds


def walk(setting: Setting) -> list[str]:
    """The launches of stages 2, 3 and 4, and those of steps. Returns what could not be walked."""
    failed = []
    with ExitStack() as stack:
        for each in MODULES:
            for name in INSTEAD.keys() & vars(each).keys():
                stack.enter_context(patch.object(each, name, INSTEAD[name]))
        runs = [(name, run) for each in MODULES for name, run in each.cases(setting).items()]
        runs += [
            ("steps", partial(_walk_steps, setting, shapes))
            for shapes in (setting.mistral, setting.small)
        ]
        for name, run in runs:
            if name in SAME:
                continue
            try:
                for _ in run():
                    pass
            except Exception as error:  # of one kernel: the others are still to be compiled
                traceback.print_exc()
                failed.append(f"{name}: {error}")
    return failed


def _walk_steps(setting: Setting, shapes: ModelShapes) -> Iterator[Finding]:
    """One layer and what is around it, in every bucket, with LoRAs, trees and heads."""
    shapes, device = replace(shapes, num_layers=1), setting.device
    config = config_of(shapes)
    weights = random_weights(config, DTYPE, device, packing_of())
    backend = TritonBackend(config, weights, device, DTYPE, None, counting(device)[0])
    adapters = [
        random_lora(shapes, DTYPE, device, targets=targets)
        for targets in (LAYER_TARGETS, (*LAYER_TARGETS, LM_HEAD, EMBED))
    ]
    stacks = [[LoraWeights.from_buffer(each.buffer, each.layout)] for each in adapters]
    heads = random_heads(shapes, DTYPE, device)
    kv = backend.make_kv(num_pages(decoding(shapes, BUCKETS[-1], PAGE)), PAGE)
    for bucket in BUCKETS:
        for loras in ((), *stacks):
            backend.forward(decoding(shapes, bucket, PAGE, loras=loras), kv)
    for nodes in (2, 4, 8, 16):
        backend.forward(decoding(shapes, 2, PAGE, nodes=nodes, heads=heads), kv)
    yield Finding("buckets", len(BUCKETS))


def _tell(name: str, made: Any, seconds: float) -> None:
    """A line of JSON. A kernel that a device refuses, for its shared memory, has no registers."""
    told = {"kernel": name, "seconds": seconds}
    if made is not None:
        told["shared"] = made.metadata.shared
        try:
            made._init_handles()
            told |= {"registers": made.n_regs, "spills": made.n_spills}
        except Exception as error:
            told["refused"] = str(error)
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    setting = Setting.here(tiny="--tiny" in sys.argv)
    sys.exit(bool(share(setting, int(sys.argv[1]), int(sys.argv[2]), _tell)))
