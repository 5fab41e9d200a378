"""An adapter of the hub that the store lacks is fetched when it is asked for: once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from lorastack.config import AdapterConfig, GatewayConfig
from tests.helpers.fake_hub import FakeHub
from tests.helpers.live import ROOMY, LiveServer, ask


@pytest.fixture
def hub(zoo: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_folder("org/owl", zoo["say-owl"])
        hub.add_folder("org/heads", zoo["heads-wise"])
        hub.add_folder("org/secret", zoo["say-bat"], private=True)
        hub.add_folder("others/owl", zoo["say-owl"])
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def pulling(hub: FakeHub, tiny_llama: Path, tmp_path: Path) -> Iterator[LiveServer]:
    adapters = AdapterConfig(store=tmp_path / "store", pull_orgs=("org",))
    with LiveServer(
        tiny_llama, engine=ROOMY, adapters=adapters, http=GatewayConfig(port=0)
    ) as server:
        yield server


def generate(server: LiveServer, path: str = "/generate", **parameters: object) -> httpx.Response:
    body = {"inputs": "hello there", "parameters": {"max_new_tokens": 9, **parameters}}
    return httpx.post(f"http://{server.server.http_address}{path}", json=body, timeout=120)


def test_eight_that_ask_at_once_share_one_pull(pulling: LiveServer, hub: FakeHub) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: generate(pulling, adapter_id="org/owl"), range(8)))
    assert {reply.json()["generated_text"] for reply in replies} == {"owlowlowl"}
    weights = [name for name, _ in hub.transfers if name.endswith(".safetensors")]
    assert len(weights) == 1
    assert [adapter.id for adapter in pulling.client.list_adapters()] == ["org/owl"]


def test_a_stream_and_a_merge_pull_too(pulling: LiveServer, hub: FakeHub) -> None:
    reply = generate(pulling, "/generate_stream", adapter_id="org/owl", adapter_source="hub")
    assert '"generated_text":"owlowlowl"' in reply.text
    assert generate(pulling, adapter_id="org/heads").status_code == 200
    merged = {"ids": ["org/owl", "org/secret"], "weights": [0.0, 1.0], "density": 0.5}
    reply = generate(pulling, merged_adapters=merged, api_token=hub.token)
    assert reply.json()["generated_text"] == "batbatbat"


def test_a_pull_that_may_not_be_names_the_adapter_and_never_serves_the_base(
    pulling: LiveServer, hub: FakeHub
) -> None:
    for adapter_id, source in (("others/owl", None), ("others/owl", "hub"), ("org/owl", "local")):
        for path in ("/", "/generate", "/generate_stream"):
            reply = generate(pulling, path, adapter_id=adapter_id, adapter_source=source)
            assert reply.status_code == 404
            assert adapter_id in reply.json()["error"]
    private = generate(pulling, adapter_id="org/secret")
    assert private.status_code == 404
    assert pulling.client.list_adapters() == []
    assert hub.transfers == []


def test_a_token_opens_what_is_private(pulling: LiveServer, hub: FakeHub) -> None:
    reply = generate(pulling, adapter_id="org/secret", api_token=hub.token)
    assert reply.json()["generated_text"] == "batbatbat"
    direct = pulling.client.generate(
        ask("hello there", stack=[("org/secret", 1.0)], max_new_tokens=9)
    )
    assert direct.text == "batbatbat"
