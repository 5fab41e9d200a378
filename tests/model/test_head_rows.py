"""Rows of lm_head as every backend gives them: the checkpoint's, whatever they were packed into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorastack.model.backends.load import load_backend
from lorastack.startup.files import ModelFiles
from tests.helpers.tiny import VOCAB_SIZE, build_llama

SCATTERED = [0, 1, 15, 16, 17, 31, 40, VOCAB_SIZE - 1]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [SCATTERED, range(VOCAB_SIZE), [7]], ids=["some", "all", "one"])
def test_rows_are_the_checkpoints(
    folder: Path, dtype: torch.dtype, native: bool, ids: list[int]
) -> None:
    cpu = torch.device("cpu")
    decoder = load_backend(folder, device=cpu, dtype=dtype, max_context=None, native=native)
    weight_VH = ModelFiles(folder).base_weight("lm_head.weight").to(dtype)
    out_NH = torch.full((len(ids), weight_VH.shape[1]), torch.nan, dtype=dtype)
    decoder.head_rows(ids, out_NH)
    assert torch.equal(out_NH, weight_VH[list(ids)])
