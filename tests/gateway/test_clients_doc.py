"""The examples of docs/clients.md run as they are written, but for address and names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack.config import AdapterConfig, GatewayConfig
from tests.helpers.foreign import lorax_python, run_in
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.test_layering import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# The page's adapters belong to the default model; these stand for them on the tiny one.
NAMES = {"heads-general": "heads-5", "heads-code": "heads-wise", "lora-gsm8k": "say-owl"}
PROMPT = re.compile(r'(?:prompt = |"inputs": |generat\w+\(\s*)"([^"]*)"')


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    adapters = AdapterConfig(store=tmp_path_factory.mktemp("page") / "store")
    with LiveServer(
        tiny_llama,
        engine=ROOMY,
        adapters=adapters,
        http=GatewayConfig(port=0),
        max_context=256,  # some examples run up to its end
    ) as server:
        server.upload_all({name: zoo[name] for name in NAMES.values()})
        server.client.set_default_medusa(NAMES["heads-general"])
        yield server


def wanted(server: LiveServer, text: str) -> str:
    """What gRPC gives for an example."""
    (prompt,) = PROMPT.findall(text)
    limit = re.search(r'max_new_tokens"?[=:] ?(\d+)', text)
    adapter = re.search(r'(?:adapter_id|model)"?[=:] ?"([^"]*)"', text)
    name = adapter[1] if adapter else ""
    is_lora = name.startswith("say-")
    reply = server.client.generate(
        ask(
            prompt,
            stack=[(name, 1.0)] if is_lora else (),
            heads="" if is_lora else name,
            max_new_tokens=int(limit[1]) if limit else None,
        )
    )
    return reply.text


def output(language: str, text: str, tmp_path: Path) -> str:
    """What an example prints."""
    if language == "bash":
        words = ["bash", "-c", f"set -o pipefail; {text}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        generated: str = json.loads(done.stdout)["generated_text"]
        return generated
    script = tmp_path / "example.py"
    script.write_text(text, encoding="utf-8")
    python = lorax_python() if "from lorax" in text else Path(sys.executable)
    return run_in(python, ["-X", "utf8", str(script)]).removesuffix("\n")


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_an_example_gives_what_grpc_gives(
    language: str, text: str, server: LiveServer, tmp_path: Path
) -> None:
    for name, stand_in in NAMES.items():
        text = text.replace(name, stand_in)
    text = text.replace("127.0.0.1:8000", server.server.http_address or "")
    expected = wanted(server, text)
    # Universal newlines turn what a tiny model writes into others.
    assert output(language, text, tmp_path).splitlines() == expected.splitlines()
    if "say-owl" in text:
        assert expected.startswith("owlowl")
