"""How close does a cold load come to the disk? One rank-16 adapter of Mistral-7B's shapes, 84 MB.

A load reads the stored file, checks its sha256 and unpacks it into the buffer that a device gets
(on a CPU that buffer is the device's). Beside it, in turns: the same file read, then copied, with
nothing checked and into memory that was in use before. Ahead of either the file's pages are dropped
from the system's cache.

    python -m benchmarks.paging.cold_start
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file

from benchmarks.paging.synthetic import store_folder
from benchmarks.report import report
from lorastack.adapters.formats.parse import parse
from lorastack.adapters.formats.targets import module_names
from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.store.registry import Registry
from lorastack.config import MIB
from lorastack.kernels.packing import allocate
from lorastack.layout import LAYER_TARGETS
from tests.helpers.shapes import MISTRAL_7B

RANK = 16
WEIGHTS = "adapter_model.safetensors"
PIECE = 4 * MIB


def main(
    repeats: Annotated[int, typer.Option(help="Calls that a timing takes.")] = 15,
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure.", show_default="the system's")
    ] = None,
) -> None:
    """Measure and print a table and a JSON line."""
    with tempfile.TemporaryDirectory(prefix="lorastack-", dir=folder) as scratch:
        registry = Registry(Path(scratch, "store"))
        digest = store(registry, Path(scratch, "source"))
        blob = registry.files(digest)[WEIGHTS]
        rows = [
            measure(registry, digest, blob, dtype, repeats)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        megabytes = round(blob.stat().st_size / 1e6, 1)
        registry.close()
    report("A cold load of bfloat16 weights", rows, megabytes=megabytes, num_cpus=os.cpu_count())


def no_heads(ids: Sequence[int], out_NH: torch.Tensor) -> None:
    raise AssertionError("a LoRA without heads asks for rows of lm_head")


def measure(
    registry: Registry, digest: str, blob: Path, dtype: torch.dtype, repeats: int
) -> dict[str, object]:
    """Medians, load and plain copy in turns. dtype: of the device."""
    load = Loader(
        registry=registry,
        shapes=MISTRAL_7B,
        allocate=partial(allocate, dtype=dtype),
        head_rows=no_heads,
    )
    memory = [np.zeros(blob.stat().st_size, dtype=np.uint8) for _ in range(2)]
    reads, copies, loads = [], [], []
    for _ in range(repeats):
        drop_cached(blob)
        began = time.perf_counter()
        read(blob, memory[0])
        read_at = time.perf_counter()
        np.copyto(memory[1], memory[0])
        reads.append(read_at - began)
        copies.append(time.perf_counter() - read_at)
        drop_cached(blob)
        began = time.perf_counter()
        load(digest)
        loads.append(time.perf_counter() - began)
    plain = statistics.median(map(sum, zip(reads, copies, strict=True)))
    return {
        "device dtype": str(dtype).removeprefix("torch."),
        "read ms": round(1000 * statistics.median(reads), 1),
        "copy ms": round(1000 * statistics.median(copies), 1),
        "read + copy ms": round(1000 * plain, 1),
        "load ms": round(1000 * statistics.median(loads), 1),
        "fastest load ms": round(1000 * min(loads), 1),
        "share of bandwidth": round(plain / statistics.median(loads), 2),
    }


def read(path: Path, memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    """The whole file, in pieces."""
    with path.open("rb", buffering=0) as file:
        for start in range(0, len(memory), PIECE):
            file.readinto(memory[start : start + PIECE].data)


def drop_cached(path: Path) -> None:
    """Asks the system to forget the file's pages."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def store(registry: Registry, source: Path) -> str:
    """Writes a LoRA on all projections and uploads it; its digest."""
    source.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (_, target) in module_names(MISTRAL_7B).items():
        if target in LAYER_TARGETS:
            out, inner = MISTRAL_7B.target_shape(target)
            for part, shape in (("A", (RANK, inner)), ("B", (out, RANK))):
                values = torch.randn(shape, generator=generator).bfloat16()
                tensors[f"base_model.model.{module}.lora_{part}.weight"] = values
    save_file(tensors, source / WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "target_modules": list(LAYER_TARGETS)}
    (source / "adapter_config.json").write_text(json.dumps(config))
    validate = partial(parse, shapes=MISTRAL_7B)
    return store_folder(registry, "mistral", source, validate, base_fingerprint="").digest


if __name__ == "__main__":
    typer.run(main)
