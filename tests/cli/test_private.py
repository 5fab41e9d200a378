"""Private parts of heads at the command line: upload, listings, verify, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorastack.layout import ModelShapes
from tests.cli.conftest import Run
from tests.helpers.adapters import write_heads, write_private
from tests.service.fakes import RunningServer


@pytest.fixture
def at(fake: RunningServer) -> tuple[str, str]:
    return "--server", fake.address


@pytest.fixture
def whole(tmp_path: Path, tiny_llama_shapes: ModelShapes) -> Path:
    return write_heads(tmp_path / "whole", tiny_llama_shapes.hidden_size)


@pytest.fixture
def part(tmp_path: Path, whole: Path) -> Path:
    return write_private(tmp_path / "part", whole, rank=5)


def test_a_part_is_stored_beside_its_heads(
    run: Run, at: tuple[str, str], whole: Path, part: Path, tmp_path: Path
) -> None:
    refused = run("adapters", "upload", str(part), "--id", "part", *at)
    assert refused.code == 1
    assert "upload 'whole' first" in refused.err
    for folder in (whole, part):
        assert run("adapters", "upload", str(folder), "--id", folder.name, *at).code == 0
    lines = {
        line.split()[0]: line.split()[1:] for line in run("adapters", "list", *at).out.splitlines()
    }
    assert lines["part"][:4] == ["medusa", "3", "of", "whole"]
    assert lines["whole"][:2] == ["medusa", "3"]
    shown = dict(
        line.split(maxsplit=1) for line in run("adapters", "show", "part", *at).out.splitlines()
    )
    assert (shown["shared_heads_id"], shown["private_rank"]) == ("whole", "5")
    done = run("generate", "hi", "--medusa", "part", *at)
    assert done.code == 0
    assert ", heads part sha256:" in done.err and " of whole sha256:" in done.err
    copy = tmp_path / "copy"
    assert run("adapters", "export", "part", str(copy), *at).code == 0
    assert run("adapters", "upload", str(copy), "--id", "again", *at).code == 0


def test_verify_tells_a_part(run: Run, part: Path, tiny_llama: Path) -> None:
    done = run("adapters", "verify", str(part), "--json", "--model", str(tiny_llama))
    facts = json.loads(done.out)
    assert (facts["kind"], facts["num_heads"], facts["private_rank"]) == ("medusa", 3, 5)
    assert facts["shared_heads"]["id"] == "whole"
    assert facts["acceptance"] is False
    text = run("adapters", "verify", str(part), "--model", str(tiny_llama)).out
    assert "whole, sha256 " in text
