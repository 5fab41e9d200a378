"""Adapter folders on a client's machine: what is sent, and how received files are written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.client.downloading import Receiver, new_folder
from lorastack.client.uploading import adapter_files
from lorastack.errors import DataLossError, FailedPreconditionError, InvalidArgumentError
from lorastack.folders import choose


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_takes_its_place_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as staged:
        (staged / "file").write_text("x")
        assert not target.exists()
    assert names(tmp_path / "a") == ["b"]
    assert (target / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as staged:
        (staged / "file").write_text("x")
    assert names(tmp_path / "empty") == ["file"]


def test_nothing_stays_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "x") as staged:
        (staged / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    for target in (full, file):
        with pytest.raises(FailedPreconditionError, match=target.name), new_folder(target):
            pytest.fail("entered")
    late = tmp_path / "late"
    with pytest.raises(FailedPreconditionError, match="late"), new_folder(late) as staged:
        (staged / "file").write_text("x")
        late.mkdir()
        (late / "mine").write_text("mine")
    assert names(tmp_path) == ["file", "full", "late"]
    assert names(late) == ["mine"]


def test_a_folder_of_an_adapter(tmp_path: Path) -> None:
    """Weights, configs, templates and words; all else stays and is named."""
    sent = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    left = [".git/", "adapter_model.bin", "events.out", "optimizer.bin", "zero_to_fp32.py"]
    for name in (*sent, *left):
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_text("x")
    paths, others = adapter_files(tmp_path)
    assert [path.name for path in paths] == sent
    assert others == left
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidArgumentError, match=r"adapter_model.bin.*adapters convert"):
        adapter_files(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(InvalidArgumentError, match=r"it has: \.git/, README\.md"):
        adapter_files(tmp_path)
    os.mkfifo(tmp_path / "adapter_model.safetensors")  # opening it would wait for ever
    with pytest.raises(InvalidArgumentError, match="not a regular file"):
        adapter_files(tmp_path)


def test_a_folder_of_folders(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-5", "heads", "runs"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-10", "checkpoint-5"):
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "heads" / "medusa_lm_head.safetensors").write_text("")
    named = r"\(checkpoint-10, checkpoint-5, heads\)"
    with pytest.raises(InvalidArgumentError, match=named):
        adapter_files(tmp_path)


@given(names=st.lists(st.text(min_size=1)), data=st.data())
def test_names_are_told_apart_and_can_be_sent(names: list[str], data: st.DataObject) -> None:
    """Every name is sent or left out, and the names that are left out fit into any message."""
    names = [*{*names, "w.safetensors"}]
    choice = choose(names, "here", lambda name: ())
    left = [name for name in names if name not in choice.files]
    assert not any(name.endswith((".pt", ".bin", ".pth", ".pkl", "/")) for name in choice.files)
    assert len(choice.left_out) == min(len(left), 65)
    assert all(name.isprintable() for name in choice.left_out)
    "".join(choice.left_out).encode()


@given(files=st.dictionaries(st.sampled_from("abcdef"), st.lists(st.binary(max_size=9))))
def test_files_arrive_in_parts(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, list[bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("received")
    receiver = Receiver(folder)
    for name, parts in files.items():
        data = b"".join(parts)
        receiver.begin(name, len(data), sha256(data))
        for part in parts:
            receiver.write(part)
    receiver.end()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: b"".join(parts) for name, parts in files.items()
    }


@pytest.mark.parametrize("got", [b"", b"dat", b"datb", b"dataa"])
def test_other_bytes_than_announced_are_found(tmp_path: Path, got: bytes) -> None:
    receiver = Receiver(tmp_path)
    receiver.begin("name", 4, sha256(b"data"))
    receiver.write(got)
    with pytest.raises(DataLossError, match="name"):
        receiver.end()
    with pytest.raises(DataLossError, match="name"):
        receiver.begin("next", 0, sha256(b""))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "..\\x", "a\0b", "twice"])
def test_names_of_the_other_side_are_not_trusted(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    receiver = Receiver(folder)
    receiver.begin("twice", 0, sha256(b""))
    with pytest.raises(InvalidArgumentError, match="refused"):
        receiver.begin(name, 0, sha256(b""))
    assert names(tmp_path) == ["folder"]


def test_bytes_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError):
        Receiver(tmp_path).write(b"x")
