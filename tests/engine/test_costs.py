"""What steps cost is measured at start, within what the model can run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorastack.engine import costs as costs_module
from lorastack.engine.batch import Batch
from lorastack.engine.costs import GPU_STEP_TOKENS, STEP_TOKENS, measure
from lorastack.engine.pages import Pages
from lorastack.engine.runner import Runner
from lorastack.model.backends.load import load_backend
from tests.helpers.tiny import build_llama

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("max_context", [2, 48])
def test_no_step_is_longer_than_the_context(tmp_path: Path, max_context: int) -> None:
    """Dynamic RoPE has frequencies for every position of the context and no further one."""
    folder = build_llama(tmp_path / "model", rope_parameters=DYNAMIC, max_position_embeddings=32)
    backend = load_backend(
        folder, device=torch.device("cpu"), dtype=torch.float32, max_context=max_context
    )
    pages = Pages(8, 16)
    costs = measure(Runner(backend, backend.make_kv(8, 16)), pages, max_context)
    measured = [tokens for tokens, _ in costs.step.points]
    assert measured == [tokens for tokens in STEP_TOKENS if tokens <= max_context]
    assert pages.num_held == 0


class ColdRunner:
    """A device that takes seconds for a step of a size that it has not run before, then 1 ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[int] = []

    def run(self, batch: Batch) -> None:
        tokens = len(batch.steps[0].token_ids)
        self.now += 0.001 if tokens in self.runs else 10.0
        self.runs.append(tokens)


def test_a_gpu_is_measured_warm_and_up_to_its_knee(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ColdRunner()
    monkeypatch.setattr(costs_module, "time", SimpleNamespace(monotonic=lambda: runner.now))
    costs = measure(runner, Pages(64, 16), 1024, on_gpu=True)  # type: ignore[arg-type]
    assert [tokens for tokens, _ in costs.step.points] == list(GPU_STEP_TOKENS)
    assert GPU_STEP_TOKENS[-1] == 256
    assert {round(seconds, 6) for _, seconds in costs.step.points} == {0.001}
    assert runner.runs == list(GPU_STEP_TOKENS) * 4
