"""Commands on revisions, memory and default heads; what `serve` makes of its flags."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorastack.config import GIB, MIB, ServerConfig
from lorastack.service import build
from lorastack.service.watch import logs
from tests.cli.conftest import Run
from tests.helpers.gpu import give_gpu
from tests.service.fakes import RunningServer

Folders = dict[str, Path]


@pytest.fixture
def at(fake: RunningServer) -> tuple[str, str]:
    return "--server", fake.address


def test_revisions_and_rollback(run: Run, at: tuple[str, str], folders: Folders) -> None:
    for name in ("lora", "other"):
        run("adapters", "upload", str(folders[name]), "--id", "x", *at)
    listed = json.loads(run("adapters", "revisions", "x", "--json", *at).out)["revisions"]
    assert [each["revision"] for each in listed] == [2, 1]
    newest, oldest = (each["digest"] for each in listed)
    lines = run("adapters", "revisions", "x", *at).out.splitlines()
    assert newest in lines[1]
    assert oldest in lines[2]
    shown = json.loads(run("adapters", "rollback", "x", oldest, "--json", *at).out)
    assert (shown["revision"], shown["digest"]) == (3, oldest)
    refused = run("adapters", "rollback", "x", "sha256:" + "0" * 64, *at)
    assert (refused.code, refused.out) == (1, "")


def test_load_and_unload(run: Run, at: tuple[str, str], folders: Folders) -> None:
    run("adapters", "upload", str(folders["lora"]), "--id", "x", *at)
    loaded = json.loads(run("adapters", "load", "x", "--json", *at).out)
    assert (loaded["residency"], loaded["pinned"]) == ("DEVICE", False)
    assert json.loads(run("adapters", "load", "x", "--pin", "--json", *at).out)["pinned"]
    unloaded = json.loads(run("adapters", "unload", "x", "--json", *at).out)
    assert (unloaded["residency"], unloaded["pinned"]) == ("DISK", False)


def test_default_heads(run: Run, at: tuple[str, str], folders: Folders) -> None:
    run("adapters", "upload", str(folders["heads"]), "--id", "h", *at)
    assert run("adapters", "default", *at).out == "none\n"
    chosen = json.loads(run("adapters", "default", "h", "--json", *at).out)
    assert chosen["medusa_id"] == "h"
    assert chosen == json.loads(run("adapters", "default", "--json", *at).out)
    assert run("adapters", "default", *at).out == f"h {chosen['medusa_digest']}\n"
    assert run("adapters", "default", "none", *at).out == "none\n"
    assert json.loads(run("adapters", "default", "--json", *at).out)["medusa_id"] == ""


def test_an_adapter_that_names_no_base_is_warned_of(
    run: Run, at: tuple[str, str], folders: Folders, tmp_path: Path
) -> None:
    unnamed = run("adapters", "upload", str(folders["lora"]), "--id", "x", *at)
    assert "names no base model" in unnamed.err
    folder = shutil.copytree(folders["lora"], tmp_path / "lora")
    config = folder / "adapter_config.json"
    fields = json.loads(config.read_text())

    def upload(base: str, *options: str) -> tuple[int, str]:
        config.write_text(json.dumps({**fields, "base_model_name_or_path": base}))
        done = run("adapters", "upload", str(folder), "--id", "x", *options, *at)
        return done.code, done.err

    assert upload("tiny") == (0, "")
    code, err = upload("someone/else")
    assert code == 1
    assert "--accept-base" in err
    assert upload("someone/else", "--accept-base") == (0, "")


ALIASES = ("--base-name", "org/one", "--base-name", "two")


def test_serve_flags_reach_the_configuration(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerConfig] = []

    class Stop(Exception):
        pass

    def build_server(config: ServerConfig, *rest: object) -> None:
        seen.append(config)
        raise Stop

    monkeypatch.setattr(build, "build_server", build_server)
    levels: list[str] = []
    monkeypatch.setattr(logs, "configure_logging", lambda log_format, level: levels.append(level))
    with pytest.raises(Stop):
        flags = ("--read-only-store", "--metrics-port", "9090", "--quantize", "int4", *ALIASES)
        run("serve", "--store", "s", "--log-level", "debug", *flags)
    with pytest.raises(Stop):
        run("serve")
    assert levels == ["debug", "info"]
    assert seen[0].adapters.read_only_store
    assert seen[0].adapters.store == Path("s")
    assert seen[0].adapters.base_names == ("org/one", "two")
    assert seen[0].service.metrics_port == 9090
    assert seen[0].model.quantize == "int4"
    assert not seen[1].adapters.read_only_store
    assert seen[1].service.metrics_port == 0
    assert seen[1].model.quantize is None
    assert (seen[1].engine.max_rows, seen[1].adapters.device_memory) == (32, 2 * GIB)
    give_gpu(monkeypatch, 139 * GIB, 140 * GIB)
    flags = ("--max-rows", "7", "--device-adapter-memory", "3MiB")
    for given in ((), flags):
        with pytest.raises(Stop):
            run("serve", "--device", "cuda", *given)
    _, _, unasked, asked = seen
    assert (unasked.engine.max_rows, unasked.adapters.device_memory) == (128, 8 * GIB)
    assert (asked.engine.max_rows, asked.adapters.device_memory) == (7, 3 * MIB)
