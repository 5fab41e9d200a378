"""Small runs of `lorastack train heads` on the tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorastack.config import MIB, AdapterConfig, EngineConfig, ModelConfig
from lorastack.train.distill import DistillOptions
from lorastack.train.options import TrainOptions
from lorastack.train.pipeline import Outcome, make_heads
from lorastack.train.run import HeadsRun
from lorastack.train.start import StartOptions
from tests.train.conftest import FAMILIAR

PROMPTS = (*FAMILIAR, "the sun", "a", "over the hill", "Sort 3 1 2", "and then?", "no", "x", "y")
ENGINE = EngineConfig(kv_memory=16 * MIB, max_rows=4, max_step_tokens=64, max_nodes=6)


def write_prompts(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def heads_run(root: Path, model: Path, store: Path | None, **changes: Any) -> HeadsRun:
    """A run in `root`, of which changes may be fields. store: None for none."""
    root.mkdir(parents=True, exist_ok=True)
    run = HeadsRun(
        adapter_id="made",
        prompts=write_prompts(root / "prompts.jsonl"),
        work=root / "work",
        model=ModelConfig(model=str(model), dtype="float32", device="cpu", threads=1),
        engine=ENGINE,
        adapters=None
        if store is None
        else AdapterConfig(store=store, device_memory=MIB, host_memory=MIB),
        start=StartOptions(num_heads=2),
        distill=DistillOptions(max_new_tokens=24),
        training=TrainOptions(epochs=8, batch_size=32, learning_rate=1e-2, held_out=0.3),
        command=("lorastack", "train", "heads"),
    )
    return replace(run, **changes)


def made(root: Path, model: Path, store: Path | None, **changes: Any) -> Outcome:
    """What such a run makes."""
    return make_heads(heads_run(root, model, store, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder but the model card, which has times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}
