"""Mistral-7B's architecture, small for `make test`, at full size for `make test-mistral`.

`LORASTACK_MISTRAL_7B=DIR|HUB_ID make test-mistral` runs real weights instead of made-up ones, and
LORASTACK_MISTRAL_7B_LORA and LORASTACK_MISTRAL_7B_MEDUSA add real adapters (a folder or a hub id
each) to the random ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorastack.config import MIB
from lorastack.kernels.native.library import library
from lorastack.layout import ModelShapes
from lorastack.model.config import load_config
from lorastack.model.kv import page_nbytes
from lorastack.startup.folder import model_folder
from tests.integration.mistral_7b.adapters import HEADS, write_adapters
from tests.integration.mistral_7b.checkpoint import FULL, HUB_ID, TWIN, synthetic, write_checkpoint
from tests.integration.mistral_7b.serving import Deployment

KV_TOKENS = 6144
# In bfloat16 only the native kernels give a row the same bits in any company.
DTYPE = torch.bfloat16 if library() else torch.float32


@pytest.fixture(scope="session")
def full_size(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--full-size"))


@pytest.fixture(scope="session")
def model(full_size: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint to serve."""
    if not full_size:
        return write_checkpoint(tmp_path_factory.mktemp("mistral") / HUB_ID, TWIN)
    real = os.environ.get("LORASTACK_MISTRAL_7B")
    return model_folder(real)[0] if real else synthetic(FULL)


@pytest.fixture(scope="session")
def shapes(model: Path) -> ModelShapes:
    return load_config(model, None).shapes


@pytest.fixture(scope="session")
def folders(shapes: ModelShapes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapter id -> folder."""
    return write_adapters(tmp_path_factory.mktemp("adapters"), shapes)


@pytest.fixture(scope="session")
def device_memory(folders: dict[str, Path]) -> int:
    """Bytes: room for the largest adapter and half of the others, which are stored in 16 bits."""
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in folders.values()]
    return (max(sizes) + sum(sizes)) // 2 * (DTYPE.itemsize // 2) + MIB // 16


@pytest.fixture(scope="session")
def deployment(
    full_size: bool,
    model: Path,
    shapes: ModelShapes,
    folders: dict[str, Path],
    device_memory: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """With every adapter, uploaded by the command line, and default heads."""
    served = Deployment(
        model,
        tmp_path_factory.mktemp("deployment"),
        (os.cpu_count() or 1) if full_size else 1,
        *("--device", "cpu", "--dtype", str(DTYPE).removeprefix("torch."), "--base-name", HUB_ID),
        *("--kv-memory", str(page_nbytes(shapes, KV_TOKENS, DTYPE))),
        *("--device-adapter-memory", str(device_memory)),
        *("--host-adapter-memory", str(device_memory)),
    )
    try:
        served.start(scripted=True)
        for name, folder in folders.items():
            served.adapters("upload", str(folder), "--id", name)
        served.client.set_default_medusa(HEADS)
        yield served
        served.stop()
    finally:
        served.kill()
