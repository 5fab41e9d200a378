"""The examples of docs/clients.md run as they are written, but for address and names."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorastack.config import AdapterConfig, GatewayConfig
from tests.helpers.foreign import lorax_python, run_in
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.test_layering import ROOT

PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# The page's adapters belong to the default model; these stand for them on the tiny one.
NAMES = {
    "heads-general": "heads-5",
    "heads-code": "heads-wise",
    "lora-gsm8k": "say-owl",
    "lora-style": "random-a",
}
ALIAS = "maths"  # of lora-gsm8k with heads-general
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = re.compile(r'(?:prompt ?= ?|"(?:inputs|prompt|content)": |generat\w+\(\s*)"([^"]*)"')
NAME = re.compile(r'(?:adapter_id|model|medusa_id)"?[=:] ?"([^"]*)"')
STACK = re.compile(r'"lora_id": "([^"]*)", "scale": ([\d.]+)')
LIMIT = re.compile(r'max_(?:new_)?tokens"?[=:] ?(\d+)')
SCHEMA = re.compile(r"^schema = (\{.*?^\})$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    adapters = AdapterConfig(store=tmp_path_factory.mktemp("page") / "store")
    with LiveServer(
        tiny_llama,
        engine=ROOMY,
        adapters=adapters,
        http=GatewayConfig(port=0, adapter_management=True),
        max_context=256,  # some examples run up to its end
    ) as server:
        server.upload_all({name: zoo[name] for name in NAMES.values()})
        server.client.alias(ALIAS, [(NAMES["lora-gsm8k"], 1.0)], NAMES["heads-general"])
        server.client.set_default_medusa(NAMES["heads-general"])
        yield server


def wanted(server: LiveServer, text: str) -> str:
    """What gRPC gives for an example."""
    if "models.list" in text:
        ids = [adapter.id for adapter in server.client.list_adapters()]
        return "\n".join([server.client.model_info().base_model, *ids])
    if "/v1/load_lora_adapter" in text:
        replies = [f"LoRA adapter 'tenant-7' {done} successfully." for done in ("added", "removed")]
        return "".join(f"Success: {reply}" for reply in replies)
    (prompt,) = PROMPT.findall(text)
    names = NAME.findall(text)
    stack = [(name, 1.0) for name in names if name.startswith("say-")]
    stack += [(lora_id, float(scale)) for lora_id, scale in STACK.findall(text)]
    heads = [name for name in names if name.startswith("heads-")]
    if ALIAS in names:
        stack, heads = [(NAMES["lora-gsm8k"], 1.0)], [NAMES["heads-general"]]
    limit = LIMIT.search(text)
    request = ask(
        prompt,
        stack=stack,
        heads=heads[0] if heads else "",
        max_new_tokens=int(limit[1]) if limit else None,
    )
    if "messages" in text:
        request.chat.messages.add(role="user", content=prompt)
    if schema := SCHEMA.search(text):
        request.response_format.json_schema = json.dumps(ast.literal_eval(schema[1]))
    reply = server.client.generate(request)
    assert [lora.lora_id for lora in reply.adapters.loras] == [name for name, _ in stack]
    return reply.text


def output(language: str, text: str, tmp_path: Path) -> str:
    """What an example prints; of a reply in JSON its text."""
    if language == "bash":
        words = ["bash", "-c", f"set -o pipefail; {text}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        return text_of(json.loads(done.stdout)) if done.stdout.startswith("{") else done.stdout
    script = tmp_path / "example.py"
    script.write_text(text, encoding="utf-8")
    python = lorax_python() if "from lorax" in text else Path(sys.executable)
    return run_in(python, ["-X", "utf8", str(script)]).removesuffix("\n")


def text_of(reply: dict[str, Any]) -> str:
    """LoRAX's, or OpenAI's of either route."""
    if "generated_text" in reply:
        text: str = reply["generated_text"]
        return text
    choice = reply["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


@pytest.mark.parametrize(("language", "text"), BLOCKS)
def test_an_example_gives_what_grpc_gives(
    language: str, text: str, server: LiveServer, tmp_path: Path
) -> None:
    for name, stand_in in {**NAMES, BASE: server.client.model_info().base_model}.items():
        text = text.replace(name, stand_in)
    text = text.replace("127.0.0.1:8000", server.server.http_address or "")
    expected = wanted(server, text)
    # Universal newlines turn what a tiny model writes into others.
    assert output(language, text, tmp_path).splitlines() == expected.splitlines()
    if re.search(r'(?:adapter_id|model)"?[=:] ?"say-owl"', text):
        assert expected.startswith("owlowl")
