"""Adapters loaded and unloaded over HTTP, as the controllers of vLLM and SGLang do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from lorastack.config import AdapterConfig
from lorastack.gateway.serving import GatewayThread, bind
from tests.gateway.conftest import GATEWAY
from tests.helpers.live import ROOMY, LiveServer, ask

WORDS = ("say-owl", "say-bat", "heads-owl")


@pytest.fixture(scope="module")
def managed(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    """A server that may pull from the zoo's folder."""
    root = zoo["say-owl"].parent
    store = tmp_path_factory.mktemp("managed") / "store"
    adapters = AdapterConfig(store=store, pull_roots=(root,))
    with LiveServer(tiny_llama, engine=ROOMY, adapters=adapters, http=GATEWAY) as server:
        server.upload_all({name: zoo[name] for name in WORDS})
        yield server


@pytest.fixture
def manage(managed: LiveServer) -> Iterator[httpx.Client]:
    """Nothing is loaded before."""
    for adapter in managed.client.list_adapters():
        if adapter.pinned:
            managed.client.unload(adapter.id)
    url = f"http://{managed.server.http_address}"
    with httpx.Client(base_url=url, timeout=120) as client:
        yield client


def load(manage: httpx.Client, name: str, path: str, **fields: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": path, **fields}
    return manage.post("/v1/load_lora_adapter", json=body)


def unload(manage: httpx.Client, name: str) -> httpx.Response:
    return manage.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_an_id_is_loaded_once_and_unloaded_once(managed: LiveServer, manage: httpx.Client) -> None:
    reply = load(manage, "say-owl", "say-owl")
    assert reply.status_code == 200
    assert reply.text == "Success: LoRA adapter 'say-owl' added successfully."
    assert managed.client.get_adapter("say-owl").pinned

    again = load(manage, "say-owl", "say-owl")
    assert again.status_code == 400
    for error in (again.json(), again.json()["error"]):  # controllers read either
        assert error["type"] == "InvalidUserInput"
        assert "has already been loaded" in error["message"]
        assert error["code"] == 400
    assert load(manage, "say-owl", "say-owl", load_inplace=True).status_code == 200

    reply = unload(manage, "say-owl")
    assert reply.status_code == 200
    assert reply.text == "Success: LoRA adapter 'say-owl' removed successfully."
    assert not managed.client.get_adapter("say-owl").pinned  # and it is still there
    gone = unload(manage, "say-owl")
    assert gone.status_code == 404
    assert gone.json()["error"]["type"] == "NotFoundError"
    assert "cannot be found" in gone.json()["message"]


def test_another_id_becomes_an_alias(managed: LiveServer, manage: httpx.Client) -> None:
    assert load(manage, "tenant-7", "say-owl").status_code == 200
    direct = managed.client.generate(ask("hello there", stack=[("say-owl", 1.0)]))
    named = managed.client.generate(ask("hello there", stack=[("tenant-7", 1.0)]))
    assert named.text == direct.text
    assert load(manage, "tenant-7", "say-owl").status_code == 400
    assert unload(manage, "tenant-7").status_code == 200
    assert load(manage, "tenant-7", "say-bat").status_code == 200  # pointed elsewhere
    assert managed.client.get_adapter("tenant-7").alias_loras[0].lora_id == "say-bat"
    assert unload(manage, "tenant-7").status_code == 200
    assert load(manage, "wise", "heads-owl").status_code == 200
    assert managed.client.get_adapter("wise").alias_medusa_id == "heads-owl"

    taken = load(manage, "say-owl", "say-bat")
    assert taken.status_code == 400
    assert "adapter of its own" in taken.json()["message"]


def test_a_folder_below_the_root_is_pulled_and_no_other(
    managed: LiveServer, manage: httpx.Client, zoo: dict[str, Path], tmp_path: Path
) -> None:
    assert load(manage, "pulled", str(zoo["say-mink"])).status_code == 200
    direct = managed.client.get_adapter("pulled")
    assert direct.pinned
    # Replaced in place, the old content keeps no pin.
    assert load(manage, "pulled", str(zoo["say-zephyr"]), load_inplace=True).status_code == 200
    assert managed.client.get_adapter("pulled").digest != direct.digest
    old = managed.client.get_adapter(f"pulled@{direct.digest}")
    assert not old.pinned
    for path in (
        str(tmp_path),
        "/etc",
        "/",
        str(zoo["say-mink"].parent / ".." / ".."),
        "/proc/self/root/etc",
        "hf://not/allowed",
        "hf://not/allowed@main",
        "hf://../../etc",
        "hf://",
        "hf://a/b@ü",
        "hf://a/b@\r\nx",
        "/a\x00b",
        "no-such-id",
        "../say-owl",
    ):
        reply = load(manage, "stolen", path)
        assert reply.status_code in (400, 403, 404), (path, reply.text)
        assert reply.json()["error"]["message"] == reply.json()["message"]
    assert unload(manage, "stolen").status_code == 404


def test_a_refused_pull_says_what_allows_it(manage: httpx.Client) -> None:
    reply = load(manage, "x", "hf://not/allowed")
    assert reply.status_code == 403
    assert "--pull-org" in reply.json()["message"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"lora_name": "a"},
        {"lora_name": "", "lora_path": "say-owl"},
        {"lora_name": "say-owl", "lora_path": ""},
        {"lora_name": "say-owl", "lora_path": "say-owl", "is_3d_lora_weight": True},
        {"lora_name": "say-owl", "lora_path": "say-owl", "base": "x"},
        {"lora_name": "bad id!", "lora_path": "say-owl"},
        {"lora_name": "none", "lora_path": "say-owl"},
        {"lora_name": 3, "lora_path": "say-owl"},
        {"lora_name": "a" * 10_000, "lora_path": "say-owl"},
        [],
    ],
    ids=str,
)
def test_wrong_bodies_are_the_users(manage: httpx.Client, body: object) -> None:
    reply = manage.post("/v1/load_lora_adapter", json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == reply.json()["type"] == "InvalidUserInput"


def test_sglangs_form(managed: LiveServer, manage: httpx.Client) -> None:
    body = {"lora_name": "say-bat", "lora_path": "say-bat", "pinned": False}
    digest = managed.client.get_adapter("say-bat").digest
    reply = manage.post("/load_lora_adapter", json=body)
    assert reply.status_code == 200
    assert reply.json() == {
        "success": True,
        "error_message": None,
        "loaded_adapters": {"say-bat": digest},
    }
    again = manage.post("/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert again.json()["success"] is False
    assert "already been loaded" in again.json()["error_message"]
    gone = manage.post("/unload_lora_adapter", json={"lora_name": "say-bat"})
    assert (gone.status_code, gone.json()["loaded_adapters"]) == (200, {})
    gone = manage.post("/unload_lora_adapter", json={"lora_name": "say-bat"})
    assert (gone.status_code, gone.json()["success"]) == (400, False)


def test_it_is_off_unless_asked_for(managed: LiveServer) -> None:
    config = replace(GATEWAY, adapter_management=False, target=managed.server.address)
    gateway = GatewayThread(config, bind(config))
    try:
        with httpx.Client(base_url=f"http://{gateway.address}") as client:
            for path in ("/v1/load_lora_adapter", "/load_lora_adapter"):
                assert client.post(path, json={}).status_code == 404
            assert "/v1/load_lora_adapter" not in client.get("/openapi.json").json()["paths"]
    finally:
        gateway.close()
