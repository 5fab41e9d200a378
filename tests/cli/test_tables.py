"""What is printed for people: nothing cut, sizes alike, flags without values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from lorastack.cli.adapters import show_adapter
from lorastack.cli.bench import HEADINGS
from lorastack.cli.main import app
from lorastack.cli.output import print_json, print_table
from lorastack.v1 import adapters_pb2 as ab
from tests.adapters.folders import edit_json
from tests.cli.conftest import Run
from tests.service.fakes import RunningServer


@pytest.fixture
def at(fake: RunningServer, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    return "--server", fake.address


@pytest.fixture
def digests(run: Run, at: tuple[str, str], folders: dict[str, Path], tmp_path: Path) -> list[str]:
    """Digests of two revisions of x, newest first."""
    for path in folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for alpha in (8, 16):
        edit_json(tmp_path / "adapter_config.json", lora_alpha=alpha)
        assert run("adapters", "upload", str(tmp_path), "--id", "x", *at).code == 0
    revisions = json.loads(run("adapters", "revisions", "x", "--json", *at).out)["revisions"]
    return [revision["digest"] for revision in revisions]


def test_digests_are_whole_at_any_width(
    run: Run, at: tuple[str, str], digests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("adapters", "revisions", "x", *at).out.splitlines()
    assert [line.split()[-1] for line in lines] == ["digest", *digests]


def test_a_rollback_takes_the_first_digits(
    run: Run, at: tuple[str, str], digests: list[str], fake: RunningServer
) -> None:
    newest, older = digests
    for start in (older, older[:15], older.removeprefix("sha256:")[:8]):
        assert run("adapters", "rollback", "x", start, *at).code == 0
        assert fake.registry.resolve("x").digest == older
        assert run("adapters", "rollback", "x", newest, *at).code == 0
    for start in ("", "sha256:", "xyz", older + "0"):
        done = run("adapters", "rollback", "x", start, *at)
        assert done.code == 1
        assert "lorastack adapters revisions x" in done.err


def test_sizes_are_for_people_and_json_has_bytes(
    run: Run, at: tuple[str, str], folders: dict[str, Path], fake: RunningServer, tiny_llama: Path
) -> None:
    run("adapters", "upload", str(folders["lora"]), "--id", "x", *at)
    run("adapters", "load", "x", *at)
    shown = json.loads(run("adapters", "show", "x", "--json", *at).out)
    assert isinstance(shown["size_bytes"], int) and isinstance(shown["device_bytes"], int)
    for done in (
        run("adapters", "show", "x", *at),
        run("adapters", "verify", str(folders["lora"]), "--model", str(tiny_llama)),
    ):
        lines = [line for line in done.out.splitlines() if "_bytes" in line]
        assert lines and all(line.endswith("KiB") for line in lines)


def test_what_is_false_is_shown_and_what_is_empty_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_adapter(ab.Adapter(id="x", compatible=False, pinned=False), as_json=False)
    fields = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (fields["compatible"], fields["pinned"]) == ("False", "False")
    assert not {"rank", "base_model", "target_modules"} & fields.keys()


def test_pull_takes_its_id_as_upload_does(run: Run, at: tuple[str, str]) -> None:
    source = ("--folder", "/dev/null")
    for named in (("x",), ("--id", "x")):
        assert "--pull-root" in run("adapters", "pull", *named, *source, *at).err
    for named in ((), ("x", "--id", "x")):
        assert run("adapters", "pull", *named, *source, *at).code == 2


def test_every_option_has_a_help_text() -> None:
    def silent(command: Any, name: str) -> list[str]:
        own = [f"{name} {p.name}" for p in command.params if not getattr(p, "help", None)]
        inner = getattr(command, "commands", {}).items()
        return own + [each for key, sub in inner for each in silent(sub, f"{name} {key}")]

    assert silent(get_command(app), "lorastack") == []


def test_flags_take_no_value_in_help(run: Run) -> None:
    for command in ((), ("serve",), ("generate",), ("adapters", "load"), ("bench",)):
        text = run(*command, "--help").out
        assert "--" in text
        assert "bool" not in text and "…" not in text


def test_no_command_shows_the_help(run: Run) -> None:
    for command in ((), ("adapters",)):
        done = run(*command)
        assert done.code == 2
        assert "Usage: lorastack" in done.err


def test_a_table_of_speeds_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(HEADINGS, [(128, 100_000, 12345.6, 12345.6, 12345.6, 1234.56, 1234.56, 12.34)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert len(set(HEADINGS)) == len(HEADINGS)


def test_bench_says_what_it_measured(run: Run, at: tuple[str, str]) -> None:
    one = ("bench", "--concurrency", "1", "--requests", "1", "--max-new-tokens", "2")
    first, *_ = run(*one, *at).out.splitlines()
    assert (
        first
        == "tests/tiny in float32 on cpu, backend fake, 3 threads, after one request to warm up"
    )
    reply = json.loads(run(*one, "--json", *at).out)
    assert (reply["base_model"], reply["threads"], reply["device"]) == ("tests/tiny", 3, "cpu")


def test_json_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"base_model": "a\x1b\x9b\x7f\u2028é"})
    text = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in text)
    assert json.loads(text) == {"base_model": "a\x1b\x9b\x7f\u2028é"}
