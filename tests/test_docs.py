"""The pages for users say what the code does: their examples run, their names exist."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format

from lorastack import client as client_module
from lorastack.cli.main import commands
from lorastack.codes import CODES
from lorastack.errors import Reason
from lorastack.service.services import SERVICES
from lorastack.v1.generation_pb2 import GenerateRequest
from tests.service.conftest import (  # noqa: F401 - fixtures
    StartFake,
    folders,
    shapes,
    start_fake,
    tokenizer,
)
from tests.test_layering import ROOT


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


def test_the_clients_examples_run(
    start_fake: StartFake,  # noqa: F811
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = start_fake(pull_roots=(tmp_path,))
    shutil.copytree(folders["lora"], tmp_path / "my-lora")
    shutil.copytree(folders["other"], tmp_path / "my-other-lora")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("docs/client.md", "python"):
        exec(block.replace("127.0.0.1:50051", fake.address), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert "no adapter 'nobody'" in capsys.readouterr().out
    for name in (name for name in dir(client_module.Client) if not name.startswith("_")):
        assert f"client.{name}(" in page("docs/client.md") or name == "close", name


@pytest.mark.parametrize("text", blocks("docs/requests.md", "json"))
def test_examples_of_requests_are_requests(text: str) -> None:
    request = json_format.Parse(text, GenerateRequest())
    assert request.WhichOneof("input")
    if schema := request.response_format.json_schema:
        assert json.loads(schema)["type"] == "object"


def test_every_reason_is_in_the_table_with_a_status() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", page("docs/requests.md"), re.MULTILINE)
    assert sorted(reason for reason, _ in rows) == sorted(reason.value for reason in Reason)
    assert {status for _, status in rows} <= {code.name for code in CODES.values()}
    defaults = {kind.default_reason.value: code.name for kind, code in CODES.items()}
    for reason, status in rows:
        assert defaults.get(reason, status) == status, reason


def test_deployments_are_yaml_with_options_and_services_that_exist() -> None:
    texts = blocks("docs/deployment.md", "yaml")
    compose, *objects = [document for text in texts for document in yaml.safe_load_all(text)]
    (container,) = objects[0]["spec"]["template"]["spec"]["containers"]
    options = {option for p in serve_parameters() for option in p.opts}
    for words in (compose["services"]["lorastack"]["command"], container["args"]):
        assert {word for word in words if word.startswith("--")} <= options
    assert container["readinessProbe"]["grpc"]["service"] in SERVICES
    assert all(f"`{name}`" in page("docs/deployment.md") for name in SERVICES)


def serve_parameters() -> list[object]:
    return commands().commands["serve"].params  # type: ignore[attr-defined]


def test_the_readme_shows_the_example() -> None:
    assert page("examples/client.py") in blocks("README.md", "python")


def test_links_between_pages_lead_somewhere() -> None:
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
    ):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page(name)):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"
