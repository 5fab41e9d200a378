"""Folders under roots: what is read, and that nothing outside can be."""

from __future__ import annotations

import os
import socket
from contextlib import chdir
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.sources import folder as folder_module
from lorastack.adapters.sources.base import Limits
from lorastack.adapters.sources.folder import find_files
from lorastack.errors import (
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
)

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 200_000}
ROOMY = Limits(max_files=8, max_bytes=1 << 24)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the adapter `lora`, beside a folder with secrets."""
    write(tmp_path / "root" / "lora", FILES)
    write(tmp_path / "outside", {name: b"secret" for name in FILES})
    return tmp_path / "root"


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def alive() -> None:
    pass


def read(folder: Path | str, *roots: Path, limits: Limits = ROOMY) -> dict[str, bytes]:
    source = find_files(str(folder), roots, limits, alive)
    return {file.spec.name: b"".join(file.read(0)) for file in source.files}


def refusal(kind: type[LorastackError], folder: Path | str, *roots: Path) -> LorastackError:
    with pytest.raises(kind) as caught:
        read(folder, *roots)
    return caught.value


def test_a_folder_is_read(root: Path, tmp_path: Path) -> None:
    (root / "lora" / "optimizer.pt").write_bytes(b"not needed")
    (root / "lora" / ".hidden.json").write_bytes(b"not needed")
    (root / "lora" / "checkpoint-5").mkdir()
    assert read(root / "lora", root) == FILES
    assert read(root / "lora", tmp_path / "outside", root) == FILES
    assert read(root / "lora", root / "lora") == FILES  # the root itself is the adapter
    assert read(f"{root}/x/../lora/.", root) == FILES
    source = find_files(str(root / "lora"), [root], ROOMY, alive)
    assert source.left_out == (".hidden.json", "checkpoint-5/", "optimizer.pt")
    weights = next(file for file in source.files if file.spec.size > 2)
    assert b"".join(weights.read(1_000_000)) == FILES[weights.spec.name][1_000_000:]


def test_outside_is_refused_whether_it_is_there_or_not(root: Path, tmp_path: Path) -> None:
    for folder in (
        tmp_path / "outside",
        tmp_path / "missing",
        tmp_path,
        f"{root}/../outside",
        f"{root}/lora/../../outside",
        f"{root}/../missing",
        f"{root}x",
        "/",
        "/etc",
    ):
        assert "--pull-root" in refusal(PermissionDeniedError, folder, root).message


@pytest.mark.parametrize("bad", ["", "lora", "./lora", "~/lora", "/a\0b"])
def test_paths_must_be_absolute(root: Path, bad: str) -> None:
    refusal(InvalidArgumentError, bad, root)


def test_links_out_of_the_root_are_refused(root: Path, tmp_path: Path) -> None:
    (root / "folder").symlink_to(tmp_path / "outside")
    refusal(PermissionDeniedError, root / "folder", root)
    (root / "up").symlink_to("../outside")
    refusal(PermissionDeniedError, root / "up", root)
    weights = root / "lora" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    refusal(PermissionDeniedError, root / "lora", root)
    weights.unlink()
    weights.symlink_to(weights)  # a loop
    refusal(PermissionDeniedError, root / "lora", root)


def test_links_that_stay_inside_work(root: Path, tmp_path: Path) -> None:
    """As in a Hugging Face cache; and a root may be reached through a link itself."""
    (root / "blobs").mkdir()
    (root / "snapshots" / "main").mkdir(parents=True)
    for number, (name, data) in enumerate(FILES.items()):
        (root / "blobs" / str(number)).write_bytes(data)
        (root / "snapshots" / "main" / name).symlink_to(f"../../blobs/{number}")
    assert read(root / "snapshots" / "main", root) == FILES
    (tmp_path / "alias").symlink_to(root)
    assert read(tmp_path / "alias" / "lora", tmp_path / "alias") == FILES
    # Without the blobs under a root, the same links lead out.
    refusal(PermissionDeniedError, root / "snapshots" / "main", root / "snapshots")


@pytest.mark.parametrize("swapped", ["lora", "lora/adapter_model.safetensors"])
def test_a_link_swapped_in_after_the_check_is_not_followed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swapped: str
) -> None:
    honest = folder_module._open_beneath

    def swap_first(base: Path, parts: tuple[str, ...], flags: int) -> int:
        if "/".join(parts) == swapped and not (root / swapped).is_symlink():
            (root / swapped).rename(root / "kept")
            (root / swapped).symlink_to(tmp_path / "outside" / Path(swapped).relative_to("lora"))
        return honest(base, parts, flags)

    monkeypatch.setattr(folder_module, "_open_beneath", swap_first)
    refusal(LorastackError, root / "lora", root)
    assert (root / swapped).is_symlink()


def test_a_parent_swapped_for_a_link_is_not_followed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is checked, then replaced before its files are opened."""
    honest = folder_module.choose

    def swap_then_choose(names: list[str], where: str, files_in: object) -> object:
        (root / "lora").rename(root / "kept")
        (root / "lora").symlink_to(tmp_path / "outside")
        return honest(names, where, files_in)

    monkeypatch.setattr(folder_module, "choose", swap_then_choose)
    refusal(LorastackError, root / "lora", root)


def test_what_is_not_there(root: Path) -> None:
    for folder in (
        root / "missing",
        root / "missing" / "deep",
        root / "lora" / "config.json" / "x",
    ):
        refusal(NotFoundError, folder, root)
    refusal(NotFoundError, root / "lora" / "adapter_config.json", root)  # a file
    refusal(InvalidArgumentError, root, root)  # no weights in it


def test_only_regular_files(root: Path) -> None:
    (root / "lora" / "folder.json").mkdir()
    assert find_files(str(root / "lora"), [root], ROOMY, alive).left_out == ("folder.json/",)
    os.mkfifo(root / "lora" / "pipe.json")  # opening it must not wait for a writer
    assert "pipe.json" in refusal(InvalidArgumentError, root / "lora", root).message
    (root / "lora" / "pipe.json").unlink()
    with socket.socket(socket.AF_UNIX) as listener, chdir(root / "lora"):  # paths are short there
        listener.bind("socket.json")
        assert "socket.json" in refusal(InvalidArgumentError, root / "lora", root).message


def test_files_are_counted_before_any_is_opened(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        (root / "lora" / f"{number}.json").write_bytes(b"{}")
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_open_file", None)
        assert "22 files" in refusal(InvalidArgumentError, root / "lora", root).message
    monkeypatch.setattr(folder_module, "MAX_ENTRIES", 21)
    assert "more than 21" in refusal(InvalidArgumentError, root / "lora", root).message


def test_one_file_is_open_at_a_time(root: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, counts = num_open(), []
    source = find_files(str(root / "lora"), [root], ROOMY, lambda: counts.append(num_open()))
    assert set(counts) == {before + 1}
    assert num_open() == before
    pieces = source.files[0].read(0)
    next(pieces)
    assert num_open() == before + 1
    pieces.close()
    assert num_open() == before


def test_a_file_that_grows_while_it_is_read(root: Path) -> None:
    """What it had when it was found is what is taken, and what changes is not taken at all."""
    weights = root / "lora" / "adapter_model.safetensors"

    def grow() -> None:
        with weights.open("ab") as file:
            file.write(b"more" * 200_000)

    source = find_files(str(root / "lora"), [root], ROOMY, grow)
    found = {file.spec.name: b"".join(file.read(0)) for file in source.files}
    assert found == FILES
    honest = weights.read_bytes()

    def shrink() -> None:
        weights.write_bytes(honest[:10])

    with pytest.raises(InvalidArgumentError, match="changed"):
        find_files(str(root / "lora"), [root], ROOMY, shrink)


def test_a_folder_of_folders_names_those_with_adapters(root: Path, tmp_path: Path) -> None:
    top = root / "out"
    for name in ("checkpoint-5", "checkpoint-10"):
        write(top / name, FILES)
    (top / "runs").mkdir()
    write(tmp_path / "outside" / "in", FILES)
    (top / "link").symlink_to(tmp_path / "outside" / "in")  # not looked into
    message = refusal(InvalidArgumentError, top, root).message
    assert "(checkpoint-10, checkpoint-5)" in message
    (top / "adapter_model.bin").write_bytes(b"PK")
    assert "adapters convert" in refusal(InvalidArgumentError, top, root).message


def test_limits_hold_before_anything_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "describe", None)
    for limits in (Limits(max_files=1, max_bytes=1 << 30), Limits(max_files=8, max_bytes=1000)):
        with pytest.raises(InvalidArgumentError):
            read(root / "lora", root, limits=limits)


@given(parts=st.lists(st.sampled_from(["..", ".", "lora", "up", "in", "x"]), max_size=7))
def test_no_path_reads_a_secret(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    top = tmp_path_factory.getbasetemp() / "no-path"
    root = top / "root"
    if not top.exists():
        write(root / "lora", FILES)
        write(top / "outside", {name: b"secret" for name in FILES})
        write(top / "x", {name: b"secret" for name in FILES})
        (root / "up").symlink_to("..")
        (root / "in").symlink_to(root)
        (root / "lora" / "x").symlink_to(top / "outside")
    try:
        found = read("/".join([str(root), *parts]), root)
    except LorastackError:
        return
    assert found == FILES
