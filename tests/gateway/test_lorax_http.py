"""LoRAX's and TGI's routes, body by body."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorastack.config import AdapterConfig, GatewayConfig
from lorastack.gateway.lorax.bodies import Parameters
from lorastack.v1 import generation_pb2 as pb
from tests.gateway.words import in_text
from tests.helpers.live import ROOMY, LiveServer, ask

PROMPT = "hello there"
ROUTES = ("/", "/generate", "/generate_stream")


def post(http: httpx.Client, path: str, **parameters: Any) -> httpx.Response:
    return http.post(path, json={"inputs": PROMPT, "parameters": parameters})


def events(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in reply.text.split("\n\n") if line]


def text_of(reply: httpx.Response) -> str:
    """generated_text, whatever the route."""
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        content: Any = events(reply)[-1]
    else:
        content = reply.json()
    text: str = (content[0] if isinstance(content, list) else content)["generated_text"]
    return text


@pytest.mark.parametrize("path", ROUTES)
def test_an_adapter_is_applied_on_every_route(
    http: httpx.Client, served: LiveServer, path: str
) -> None:
    ways: dict[str, tuple[dict[str, Any], list[tuple[str, float]]]] = {
        "adapter_id": ({"adapter_id": "say-mink"}, [("say-mink", 1.0)]),
        "lora_id": ({"lora_id": "random-a", "medusa_id": "heads-wise"}, [("random-a", 1.0)]),
        "loras": (
            {"loras": [{"lora_id": "random-a", "scale": 0.5}, {"lora_id": "random-b"}]},
            [("random-a", 0.5), ("random-b", 1.0)],
        ),
        "the base": ({"medusa_id": "none", "speculation": {"mode": "off"}}, []),
    }
    texts = set()
    for parameters, stack in ways.values():
        wanted = served.client.generate(ask(PROMPT, stack=stack, max_new_tokens=20))
        got = text_of(post(http, path, max_new_tokens=20, **parameters))
        assert got == in_text(wanted)
        texts.add(got)
    assert len(texts) == len(ways)


@pytest.mark.parametrize("path", ROUTES)
def test_an_alias_is_all_that_it_names(http: httpx.Client, served: LiveServer, path: str) -> None:
    name, stack = "team/anyone", [("random-a", 0.5), ("random-b", 1.0)]
    wanted = served.client.generate(ask(PROMPT, stack=stack, heads="heads-owl", max_new_tokens=12))
    served.client.alias(name, stack, "heads-owl")
    try:
        over_grpc = served.client.generate(
            ask(PROMPT, stack=[(name, 1.0)], heads="", max_new_tokens=12)
        )
        got = text_of(post(http, path, adapter_id=name, max_new_tokens=12))
    finally:
        served.client.delete_adapter(name)
    assert got == over_grpc.text == wanted.text
    assert over_grpc.adapters.medusa_id == "heads-owl"
    assert got != text_of(post(http, path, max_new_tokens=12))
    assert post(http, path, adapter_id=name).status_code == 404  # gone; never the base model


@pytest.mark.parametrize("path", ROUTES)
def test_a_merge_is_the_servers(http: httpx.Client, served: LiveServer, path: str) -> None:
    ids, weights = ["say-owl", "say-bat"], [0.5, 0.25]
    given = {"ids": ids, "weights": weights, "merge_strategy": "ties", "density": 0.6}
    loras = [
        pb.LoraRef(lora_id=lora_id, scale=weight)
        for lora_id, weight in zip(ids, weights, strict=True)
    ]
    merged = served.client.merge(loras, "ties", 0.6)
    wanted = served.client.generate(ask(PROMPT, stack=[(merged.id, 1.0)], max_new_tokens=12))
    got = text_of(post(http, path, merged_adapters=given, max_new_tokens=12))
    assert got == wanted.text != text_of(post(http, path, max_new_tokens=12))


@pytest.mark.parametrize("path", ROUTES)
def test_unset_parameters_come_as_null(http: httpx.Client, path: str) -> None:
    nulls = dict.fromkeys(Parameters.model_fields)
    plain = text_of(post(http, path, max_new_tokens=8))
    assert text_of(post(http, path, **{**nulls, "max_new_tokens": 8})) == plain


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"max_tokens": 8}, "max_tokens"),
        ({"max_new_tokens": "8"}, "max_new_tokens"),
        ({"seed": -1}, "seed"),
        ({"temperature": 1e300}, "temperature"),
        ({"adapter_id": "say-owl", "lora_id": "say-owl"}, "adapter_id and lora_id"),
        ({"adapter_source": "pbase", "adapter_id": "x"}, "pbase"),
        ({"lora_id": "heads-wise"}, "heads-wise"),
        ({"adapter_id": "bundle", "medusa_id": "say-owl"}, "say-owl"),
        ({"watermark": True}, "watermark"),
        ({"best_of": 2}, "best_of"),
        ({"top_n_tokens": 2}, "top_n_tokens"),
        ({"grammar": {"type": "regex", "value": "("}}, "regex"),
        ({"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}},
         "grammar"),
        ({"merged_adapters": {"ids": ["say-owl"], "weights": []}}, "weights"),
        ({"apply_chat_template": True, "truncate": 3}, "truncate"),
        ({"speculation": {"depth": 3}}, "speculation.depth"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(
    http: httpx.Client, parameters: dict[str, Any], field: str
) -> None:
    for path in ROUTES:
        given = {"details": True, **parameters} if "top_n_tokens" not in parameters else parameters
        reply = post(http, path, **given)
        if path == "/generate_stream" and "top_n_tokens" in parameters:
            continue  # its tokens always have details
        assert reply.status_code == 422, reply.text
        assert reply.json()["error_type"] == "validation"
        assert field in reply.json()["error"]


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b'{"inputs": ""}', b'{"inputs": "\\ud800"}', b'{"inputs": 3}',
     b'{"inputs": "a", "parameters": {"temperature": NaN}}', b"\xff", b'{"inputs": "a", "x": 1}'],
)  # fmt: skip
def test_a_body_that_is_none_is_refused(http: httpx.Client, raw: bytes) -> None:
    for path in ROUTES:
        reply = http.post(path, content=raw)
        assert reply.status_code == 422, (path, reply.text)
        assert set(reply.json()) == {"error", "error_type"}


def test_a_full_reply_tells_which_tokens_were_drafted(
    http: httpx.Client, served: LiveServer
) -> None:
    served.load_heads("heads-owl")
    given = {"adapter_id": "say-owl", "medusa_id": "heads-owl", "max_new_tokens": 20}
    reply = post(http, "/generate", details=True, **given)
    details = reply.json()["details"]
    skipped = [token["skipped"] for token in details["tokens"]]
    assert details["skipped_tokens"] == sum(skipped) > 0
    assert not skipped[0]  # the prompt's own step drew it
    assert reply.headers["x-generated-tokens"] == "20"
    streamed = events(post(http, "/generate_stream", **given))
    assert any(part["token"]["skipped"] for part in streamed)


def test_a_stream_has_no_place_for_the_prompts_numbers(http: httpx.Client) -> None:
    reply = post(http, "/generate_stream", decoder_input_details=True, max_new_tokens=4)
    assert reply.status_code == 422
    assert "decoder_input_details" in reply.json()["error"]


def test_without_details_there_are_none(http: httpx.Client) -> None:
    assert set(post(http, "/generate", max_new_tokens=4).json()) == {"generated_text"}
    assert events(post(http, "/generate_stream", max_new_tokens=4))[-1]["details"] is None


def test_a_reply_without_a_limit_goes_on_to_the_end_of_the_context(
    tiny_llama: Path, tmp_path: Path
) -> None:
    adapters = AdapterConfig(store=tmp_path / "store")
    limits = {"engine": ROOMY, "http": GatewayConfig(port=0), "max_context": 64}
    with LiveServer(tiny_llama, adapters=adapters, **limits) as server:  # type: ignore[arg-type]
        wanted = server.client.generate(ask(PROMPT, max_new_tokens=None, ignore_eos=True))
        assert wanted.finish_reason == pb.GenerateResponse.LENGTH
        with httpx.Client(base_url=f"http://{server.server.http_address}", timeout=120) as http:
            parts = events(post(http, "/generate_stream", ignore_eos_token=True, details=True))
    assert [part["token"]["id"] for part in parts] == list(wanted.token_ids)
    assert parts[-1]["details"]["finish_reason"] == "length"
    assert parts[-1]["generated_text"] == wanted.text


def test_a_chat_template_makes_the_prompt_a_turn(http: httpx.Client, served: LiveServer) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=PROMPT)])
    request = ask("", max_new_tokens=8)
    request.chat.CopyFrom(chat)
    wanted = served.client.generate(request)
    got = post(http, "/generate", apply_chat_template=True, max_new_tokens=8)
    assert text_of(got) == wanted.text


def test_info_tells_the_limits(http: httpx.Client, served: LiveServer) -> None:
    info, model = http.get("/info").json(), served.client.model_info()
    assert info["model_id"] == model.base_model
    assert info["max_total_tokens"] == model.limits.max_context


def test_tokens_come_with_text_and_place(http: httpx.Client, served: LiveServer) -> None:
    tokens = http.post("/tokenize", json={"inputs": "naïve 日本"}).json()
    assert [token["id"] for token in tokens] == served.tokenize("naïve 日本")
    places = [(token["start"], token["stop"]) for token in tokens]
    assert (max(stop for _, stop in places), places[-1][1]) == (8, 8)
    one = [token for token in tokens if token["stop"] - token["start"] == 1]
    assert any(token["text"].strip() == "v" for token in one)
    for body in ({"inputs": "a", "add_special_tokens": False}, {"inputs": ""}, {"prompt": "a"}):
        assert http.post("/tokenize", json=body).status_code == 422
