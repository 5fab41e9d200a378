"""Uploads whose connection breaks at any byte: stored whole or not at all, and resumable."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lorastack.client import Client
from lorastack.config import KIB
from lorastack.errors import NotFoundError, UnavailableError
from tests.faults.conftest import Configure
from tests.faults.store_files import assert_tidy, assert_whole
from tests.helpers.live import ask
from tests.helpers.process import ServerProcess
from tests.helpers.proxy import CuttingProxy

NUM_CUTS = [12, pytest.param(400, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]


@pytest.fixture(scope="module")
def speaker(canaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks and a bit; what makes it an adapter comes first."""
    folder = tmp_path_factory.mktemp("cut") / "zephyr"
    folder.mkdir()
    for path in canaries["zephyr"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "notes.md").write_bytes(random.Random(0).randbytes(600 * KIB))
    return folder


@pytest.mark.parametrize("num_cuts", NUM_CUTS)
def test_cut_at_random_bytes(num_cuts: int, configure: Configure, speaker: Path) -> None:
    config = configure()
    size = sum(path.stat().st_size for path in speaker.iterdir())
    cuts = random.Random(num_cuts)
    with ServerProcess(config) as server, Client(server.address) as direct:
        for _ in range(num_cuts):
            # All of a call is a little more than the files; its last bytes are one cut of ten.
            budget = cuts.randrange(size) if cuts.random() < 0.9 else size + cuts.randrange(KIB)
            with CuttingProxy(server.address, [budget]) as proxy, Client(proxy.address) as client:
                acknowledged = True
                try:
                    client.upload(speaker, "speaker")
                except UnavailableError:
                    acknowledged = False
            listed = [adapter.id for adapter in direct.list_adapters()]
            assert listed == ["speaker"] if acknowledged else listed in ([], ["speaker"])
            assert_whole(config.adapters.store)
            if not listed:
                with pytest.raises(NotFoundError):
                    direct.generate(ask("7", stack=[("speaker", 1.0)]))
                direct.upload(speaker, "speaker")
            said = direct.generate(ask("7", stack=[("speaker", 1.0)], max_new_tokens=6))
            assert said.text == "zephyr"
            direct.delete_adapter("speaker")
        direct.upload(speaker, "speaker")
    assert_tidy(config.adapters.store)
