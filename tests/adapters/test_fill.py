"""One pass over stored files: every value in its place, every byte hashed, no threads left over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from lorastack.adapters.formats.dtypes import DTYPES
from lorastack.adapters.formats.tensorfile import read_header
from lorastack.adapters.memory import fill as fill_module
from lorastack.adapters.memory.fill import Place, fill
from lorastack.tensorheader import TensorEntry
from tests.adapters.folders import sha256

TENSORS = st.lists(
    st.tuples(st.integers(0, 70), st.sampled_from(list(DTYPES.values()))), min_size=1, max_size=6
)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_module, "CHUNK", 64)
    monkeypatch.setattr(fill_module, "GRAIN", 5)


def write(path: Path, tensors: dict[str, Tensor], padding: int = 0) -> dict[str, TensorEntry]:
    """A safetensors file whose data starts at any place."""
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * padding
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return read_header(path, path.name)


@pytest.mark.usefixtures("small_pieces")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TENSORS, st.integers(0, 9), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_values_and_hashes(
    tmp_path: Path,
    shapes: list[tuple[int, torch.dtype]],
    padding: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """Any dtypes, sizes and alignments; tensors without a place (copies of base weights)."""
    tensors = {f"t{i}": torch.randn(size).to(kind) for i, (size, kind) in enumerate(shapes)}
    config, weights = tmp_path / "config.json", tmp_path / "x.safetensors"
    config.write_bytes(b"{}" * data.draw(st.integers(0, 100)))
    entries = write(weights, tensors, padding)
    wanted = data.draw(st.lists(st.sampled_from(sorted(tensors)), unique=True))
    places: list[Place] = [
        (entries[name], torch.empty(len(tensors[name]), dtype=dtype)) for name in wanted
    ]
    digests = fill([config, weights], places)
    assert digests == [sha256(config.read_bytes()), sha256(weights.read_bytes())]
    for entry, target in places:
        assert torch.equal(target, tensors[entry.name].to(dtype))


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_ends_early_has_another_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = write(path, {"a": torch.randn(50), "b": torch.randn(50)})
    whole = path.read_bytes()
    places: list[Place] = [(entry, torch.empty(50)) for entry in entries.values()]
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert fill([path], places) == [sha256(whole[:size])]
    with pytest.raises(FileNotFoundError):
        fill([path, tmp_path / "gone"], places)


# OpenMP's threads live as long as the thread that had them started, so a helper counts for itself.
NO_OPENMP = """
import os, sys, torch
from pathlib import Path
from lorastack.adapters.memory import fill as fill_module
from lorastack.adapters.formats.validate import _check_copy
from lorastack.adapters.formats.tensorfile import check_finite, read_header

def num_threads():
    return len(os.listdir("/proc/self/task"))

def counting(data, batch):
    unpack(data, batch)
    counts.append(num_threads())

unpack, fill_module._unpack, counts = fill_module._unpack, counting, []
path = Path(sys.argv[1])
(entry,) = read_header(path, "x").values()
before = num_threads()
target = torch.empty(entry.nbytes // 2)
fill_module.fill([path], [(entry, target)])
check_finite(entry)
_check_copy("base", entry, target.view(entry.shape))
assert counts and max(counts) <= before + 2 and num_threads() == before, (before, counts)
torch.empty(1 << 20).copy_(torch.empty(1 << 20, dtype=torch.float16))
assert num_threads() > before, "torch would not have used OpenMP at all"
"""


def test_no_openmp_threads_are_started(tmp_path: Path) -> None:
    """They would run beside the step's own at the loader's low priority, and hold it up."""
    write(tmp_path / "x", {"a": torch.randn(1 << 20).half()})
    subprocess.run(
        [sys.executable, "-c", NO_OPENMP, str(tmp_path / "x")],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "4"},
    )
