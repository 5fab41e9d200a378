"""The work folder: whose it is, what it remembers, what a restart throws away."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.train.work import ADAPTER, CORPUS, WorkFolder

OPTIONS = {"--id": "x", "--seed": 0, "--lora": ["a:1", "b:0.5"], "--max-context": None}


def claimed(root: Path, options: dict[str, object] = OPTIONS, *, restart: bool = False) -> None:
    work = WorkFolder(root)
    try:
        work.claim(options, restart=restart, answers=("--seed", "--lora"))
    finally:
        work.close()


def test_the_same_options_go_on(tmp_path: Path) -> None:
    claimed(tmp_path / "a" / "work")
    claimed(tmp_path / "a" / "work")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("--seed", 1, "--seed was 0 and is 1"),
        ("--lora", [], "--lora was a:1, b:0.5 and is not given"),
        ("--max-context", 64, "--max-context was not given and is 64"),
        ("--new", 2, "--new was not given and is 2"),
    ],
)
def test_others_are_named(name: str, value: object, words: str, tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(InvalidArgumentError, match=words):
        claimed(tmp_path, {**OPTIONS, name: value})
    claimed(tmp_path)


def test_a_restart_removes_what_runs_leave_and_nothing_else(tmp_path: Path) -> None:
    claimed(tmp_path)
    (tmp_path / CORPUS).mkdir()
    (tmp_path / CORPUS / "states").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ADAPTER).mkdir()
    claimed(tmp_path, OPTIONS | {"--seed": 1}, restart=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LOCK", "notes.txt", "run.json"]


def test_a_restart_keeps_answers_that_would_be_the_same(tmp_path: Path) -> None:
    claimed(tmp_path)
    for name in (CORPUS, ADAPTER):
        (tmp_path / name).mkdir()
    changed = OPTIONS | {"--id": "y"}
    claimed(tmp_path, changed, restart=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LOCK", CORPUS, "run.json"]
    claimed(tmp_path, changed)
    (tmp_path / "run.json").write_text("damaged")
    claimed(tmp_path, changed, restart=True)
    assert not (tmp_path / CORPUS).exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InvalidArgumentError, match=r"holds something else .*thesis\.tex"):
        WorkFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        WorkFolder(tmp_path / "thesis.tex")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(InvalidArgumentError, match="is no folder"):
        WorkFolder(tmp_path / "link")


def test_one_process_works_there_at_a_time(tmp_path: Path) -> None:
    first = WorkFolder(tmp_path)
    with pytest.raises(FailedPreconditionError, match="another process trains"):
        WorkFolder(tmp_path)
    first.close()
    WorkFolder(tmp_path).close()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_record_asks_for_a_restart(text: str, tmp_path: Path) -> None:
    claimed(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match="--restart"):
        claimed(tmp_path)
    claimed(tmp_path, restart=True)
