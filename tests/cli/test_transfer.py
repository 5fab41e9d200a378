"""pull, export and push from the shell, against a fake engine and a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.helpers.fake_hub import FakeHub
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer

Folders = dict[str, Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folders: Folders) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_folder("acme/lora", folders["lora"], private=True)
        yield hub


@pytest.fixture
def fake(start_fake: StartFake, folders: Folders) -> RunningServer:
    return start_fake(pull_orgs=("acme",), pull_roots=(folders["lora"].parent,))


@pytest.fixture
def at(fake: RunningServer) -> tuple[str, str]:
    return "--server", fake.address


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pull(
    run: Run,
    at: tuple[str, str],
    hub: FakeHub,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_hub = ("adapters", "pull", "x", "--hub", "acme/lora", *at)
    refused = run(*from_hub)
    assert refused.code == 1
    assert "token" in refused.err
    monkeypatch.setenv("MY_TOKEN", hub.token)
    tag = hub.repos["acme/lora"]
    tag.revisions["v1"] = tag.revisions.pop("main")
    done = run(*from_hub, "--token-env", "MY_TOKEN", "--revision", "v1", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["kind"] == "LORA"
    assert hub.token not in done.out + done.err
    again = ("adapters", "pull", "x", "--folder", str(folders["lora"]), *at)
    shown = run(*again)
    assert "rank" in shown.out
    assert "warning: its config names no base model" in shown.err
    exists = run(*again, "--if-digest", "")
    assert (exists.code, "exists" in exists.err) == (1, True)


def test_pull_wants_one_source(run: Run, at: tuple[str, str], hub: FakeHub) -> None:
    for wrong in (
        (),
        ("--hub", "acme/lora", "--folder", "/x"),
        ("--hub", "acme/lora", "--token-env", "NOT_THERE"),
    ):
        assert run("adapters", "pull", "x", *wrong, *at).code == 2
    assert hub.transfers == []


def test_export(run: Run, at: tuple[str, str], folders: Folders, tmp_path: Path) -> None:
    assert run("adapters", "upload", str(folders["bundle"]), "--id", "x", *at).code == 0
    target = tmp_path / "out"
    done = run("adapters", "export", "x", str(target), "--json", *at)
    assert done.code == 0, done.err
    assert json.loads(done.out)["folder"] == str(target)
    assert contents(target) == contents(folders["bundle"])
    again = run("adapters", "export", "x", str(target), *at)
    assert (again.code, "empty" in again.err) == (1, True)
    assert run("adapters", "export", "y", str(tmp_path / "y"), *at).code == 1


def test_push(
    run: Run,
    at: tuple[str, str],
    hub: FakeHub,
    folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("adapters", "upload", str(folders["heads"]), "--id", "x", *at).code == 0
    monkeypatch.setenv("MY_TOKEN", hub.token)
    done = run("adapters", "push", "x", "me/heads", "--private", "--token-env", "MY_TOKEN", *at)
    assert done.code == 0, done.err
    repo = hub.repos["me/heads"]
    assert repo.private
    assert repo.revisions["main"] in done.out
    assert repo.commits[repo.revisions["main"]] == contents(folders["heads"])
    monkeypatch.setenv("MY_TOKEN", "hf_wrong")
    refused = run("adapters", "push", "x", "me/heads", "--token-env", "MY_TOKEN", *at)
    assert (refused.code, "token" in refused.err) == (1, True)


def test_a_trainers_folder_and_old_revisions(
    run: Run, at: tuple[str, str], folders: Folders, tmp_path: Path
) -> None:
    """Files that are not sent are named in one line; `prune` removes old revisions."""
    folder = tmp_path / "out"
    folder.mkdir()
    for path in folders["lora"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "optimizer.pt").write_bytes(b"PK")
    (folder / "checkpoint-5").mkdir()
    done = run("adapters", "upload", str(folder), "--id", "x", "--json", *at)
    assert done.code == 0, done.err
    assert json.loads(done.out)["id"] == "x"
    (line,) = [line for line in done.err.splitlines() if line.startswith("left out")]
    assert line.endswith(": checkpoint-5/, optimizer.pt")
    digest = json.loads(done.out)["digest"]
    assert run("adapters", "upload", str(folders["other"]), "--id", "x", *at).code == 0
    assert "on the server's disk" in run("adapters", "list", *at).err
    pruned = run("adapters", "prune", "x", "--keep", "1", "--json", *at)
    assert pruned.code == 0, pruned.err
    report = json.loads(pruned.out)
    assert report["removed_revisions"] == 1
    assert report["freed_bytes"] > 0
    assert run("adapters", "show", f"x@{digest}", *at).code == 1
    assert run("adapters", "prune", "nobody", *at).code == 1
    assert run("adapters", "prune", *at).out.startswith("removed 0 revisions")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused = run("adapters", "upload", str(folder), "--id", "y", *at)
    assert refused.code == 1
    assert "adapters convert" in refused.err
