"""`lorastack adapters alias`, and how aliases are listed and shown."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run
from tests.service.fakes import RunningServer


def test_an_alias_is_made_listed_and_shown(
    run: Run, fake: RunningServer, folders: dict[str, Path]
) -> None:
    at = ("--server", fake.address)
    for name in ("lora", "other", "heads"):
        assert run("adapters", "upload", str(folders[name]), "--id", name, *at).code == 0
    assert "stands for" not in run("adapters", "list", *at).out
    pinned = f"other@{fake.registry.resolve('other').digest}"
    parts = ("--lora", "lora", "--lora", f"{pinned}:0.5", "--medusa", "heads")
    done = run("adapters", "alias", "team/x", *parts, "--if-digest", "", *at)
    assert done.code == 0, done.err
    assert done.err == ""  # no warning about a base model
    listed = run("adapters", "list", *at).out.splitlines()
    assert listed[0].endswith("stands for")
    line = next(line for line in listed if line.startswith("team/x"))
    assert line.split()[1] == "alias"
    assert line.endswith(f"lora, {pinned}:0.5, heads heads")
    shown = dict(
        line.split(maxsplit=1) for line in run("adapters", "show", "team/x", *at).out.splitlines()
    )
    assert shown["kind"] == "alias"
    assert shown["alias_loras"] == f"lora, {pinned}:0.5"
    assert shown["alias_medusa_id"] == "heads"
    fields = json.loads(run("adapters", "show", "team/x", "--json", *at).out)
    assert fields["kind"] == "ALIAS"
    assert fields["alias_loras"] == [
        {"lora_id": "lora", "scale": 1.0},
        {"lora_id": pinned, "scale": 0.5},
    ]
    assert run("adapters", "alias", "team/x", *parts, "--if-digest", "", *at).code == 1
    wrong = run("adapters", "alias", "y", "--lora", "heads", *at)
    assert wrong.code == 1
    assert "alias 'y': 'heads' holds Medusa heads" in wrong.err
    assert "names nothing" in run("adapters", "alias", "y", *at).err
    assert run("adapters", "alias", "y", "--lora", "a:b", *at).code == 2


def test_an_alias_is_verified_without_a_server(run: Run, tiny_llama: Path, tmp_path: Path) -> None:
    text = '{"loras": [{"lora_id": "a", "scale": 0.5}], "medusa_id": "h"}'
    (tmp_path / "alias.json").write_text(text)
    done = run("adapters", "verify", str(tmp_path), "--model", str(tiny_llama), "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert (facts["kind"], facts["alias"]) == ("alias", json.loads(text))
