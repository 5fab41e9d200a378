"""What steps cost is measured at start, within what the model can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorastack.engine.costs import STEP_TOKENS, measure
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
