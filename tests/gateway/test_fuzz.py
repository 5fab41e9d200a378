"""Bodies that nobody meant, to every route: an answer below 500 that says why, and a server that
goes on as before."""

from __future__ import annotations

import asyncio
import copy
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.schemas import APIOperation

from lorastack.config import AdapterConfig
from lorastack.gateway import health
from tests.gateway.conftest import GATEWAY
from tests.helpers.chat_templates import QWEN
from tests.helpers.live import ROOMY, LiveServer

PATIENCE = 60.0  # seconds until a reply counts as a hang
NUM_CONNECTIONS = 4
NUM_EXAMPLES = 25  # of an operation of the description
MAX_TOKENS = 2
LIMITS = ("max_tokens", "max_completion_tokens", "max_new_tokens")

PARAMETERS = {
    "lora_id": "say-owl",
    "max_new_tokens": MAX_TOKENS,
    "do_sample": True,
    "seed": 3,
    "temperature": 0.5,
    "top_k": 5,
    "typical_p": 0.9,
    "repetition_penalty": 1.1,
    "stop": ["b", "é"],
    "details": True,
    "truncate": 3,
    "top_n_tokens": 2,
    "speculation": {"mode": "auto", "acceptance": "typical", "max_nodes": 3},
}
STACK = {
    "loras": [{"lora_id": "say-owl", "scale": 0.5}, {"lora_id": "random-a"}],
    "medusa_id": "heads-2",
    "max_new_tokens": MAX_TOKENS,
    "response_format": {"type": "json_object", "schema": {"type": "object"}},
    "return_k_alternatives": 2,
    "details": True,
}
MERGED = {
    "merged_adapters": {
        "ids": ["say-owl", "say-bat"],
        "weights": [0.5, 0.5],
        "merge_strategy": "ties",
        "density": 0.5,
        "majority_sign_method": "total",
    },
    "max_new_tokens": MAX_TOKENS,
}
SAMPLED = {
    "n": 2,
    "max_tokens": MAX_TOKENS,
    "stop_token_ids": [5],
    "temperature": 0.5,
    "min_p": 0.1,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1.5},
    "seed": -3,
    "stream_options": {"include_usage": True},
    "stream": True,
    "metadata": {"a": "b"},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "find", "arguments": '{"what": "owl"}'},
}
LORAX: list[dict[str, Any]] = [
    {"inputs": "hello", "parameters": PARAMETERS},
    {"inputs": "hello", "parameters": STACK},
    {"inputs": "hello", "parameters": MERGED},
    {
        "inputs": "hi",
        "parameters": {
            "max_new_tokens": MAX_TOKENS,
            "grammar": {"type": "regex", "value": "[a-z]{1,4}(x|y)+"},
        },
    },
]
WITH_PROMPT = {
    "inputs": "hello",
    "parameters": {"details": True, "decoder_input_details": True, "max_new_tokens": MAX_TOKENS},
}
LOADED = {"lora_name": "say-bat", "lora_path": "say-bat"}

VALID: dict[str, list[dict[str, Any]]] = {  # path -> bodies that it takes
    "/ping": [{}],  # takes no body, so any
    "/": [*LORAX, {**LORAX[0], "stream": True}],
    "/generate": [*LORAX, WITH_PROMPT],
    "/generate_stream": LORAX,
    "/tokenize": [{"inputs": "hello there", "add_special_tokens": True}],
    "/v1/completions": [
        {"model": "say-owl", "prompt": "hello", **SAMPLED},
        {
            "model": "tiny-llama",  # the base
            "prompt": [[1, 2, 3], [4, 5]],
            "max_tokens": 1,
            "echo": True,
            "logprobs": 2,
            "loras": [{"lora_id": "say-bat", "scale": 0.5}],
            "medusa_id": "heads-2",
        },
        {"model": "say-owl", "prompt": ["a", "b"], "max_tokens": 1, "guided_regex": "[ab]+"},
    ],
    "/v1/chat/completions": [
        {"model": "say-owl", "messages": [{"role": "user", "content": "hello"}], **SAMPLED},
        {
            "model": "say-owl",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "where?"}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "here", "tool_call_id": "call_1"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "max_completion_tokens": MAX_TOKENS,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "model": "say-owl",
            "messages": [{"role": "user", "content": "hello"}],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "find"}},
            "max_tokens": MAX_TOKENS,
            "logprobs": True,
            "top_logprobs": 2,
        },
        {
            "model": "say-owl",
            "messages": [{"role": "user", "content": "hello"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "n",
                    "schema": {
                        "type": "object",
                        "properties": {"a": {"enum": [1, "b"]}, "c": {"$ref": "#/$defs/c"}},
                        "required": ["a"],
                        "additionalProperties": False,
                        "$defs": {"c": {"type": "array", "items": {"type": "number"}}},
                    },
                },
            },
            "max_tokens": MAX_TOKENS,
        },
    ],
    "/v1/load_lora_adapter": [
        {**LOADED, "load_inplace": True},
        {"lora_name": "other", "lora_path": "say-bat"},
    ],
    "/v1/unload_lora_adapter": [{"lora_name": "say-bat", "lora_int_id": 1}],
    "/load_lora_adapter": [{**LOADED, "pinned": True}],
    "/unload_lora_adapter": [{"lora_name": "say-bat"}],
}


def deep(levels: int) -> Any:
    """Lists in objects in lists."""
    value: Any = "x"
    for level in range(levels):
        value = [value] if level % 2 else {"type": value}
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
    *(2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400),
    *("", " ", "a", "say-bat", "heads-2", "no-such", "say-owl@", "../../etc", "\0", "\n", "\ud800"),
    *("é", "🦉" * 50, "a" * 5000, "a{999}{999}", "(" * 300, "%s{{x}}", "auto", "json", "ties"),
    *([], {}, [None], [[]], {"": None}, {"a": 1}, ["a"] * 100, [1.5], {"$ref": "#"}, deep(20)),
    *(deep(80), list(range(3000)), {str(key): key for key in range(300)}),
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each container of a JSON value with each of its keys or indices."""
    inside: Any = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    for key, member in list(inside):
        yield value, key
        yield from places(member)


def mutate(rng: random.Random, body: dict[str, Any]) -> bytes:
    """A body with some changes of its values, and now and then one of its text."""
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _change(rng, body)
    for container, key in list(places(body)):
        if key in LIMITS and type(container[key]) is int and 0 < container[key] < 2**31:
            container[key] = min(container[key], MAX_TOKENS)
    text = json.dumps(body, ensure_ascii=rng.random() < 0.5)
    return _damage(rng, body, text) if rng.random() < 0.3 else text.encode(errors="surrogatepass")


def _change(rng: random.Random, body: dict[str, Any]) -> None:
    found = list(places(body))
    if not found:
        return
    container, key = rng.choice(found)
    kind = rng.randrange(8)
    if kind == 0 and key not in LIMITS:
        del container[key]
    elif kind == 1:
        other, name = rng.choice(found)
        container[key] = copy.deepcopy(other[name])
    elif kind == 2:
        container[key] = rng.choice(([container[key]], {"a": container[key]}, str(container[key])))
    elif kind == 3 and isinstance(container, dict):
        added = rng.choice(found)[1]
        container[str(added) if rng.random() < 0.7 else rng.choice(("", "x", "é", "\ud800"))] = (
            copy.deepcopy(rng.choice(VALUES))
        )
    else:
        container[key] = copy.deepcopy(rng.choice(VALUES))


def _damage(rng: random.Random, body: dict[str, Any], text: str) -> bytes:
    raw = text.encode(errors="surrogatepass")
    at = rng.randrange(len(raw) + 1)
    container, key = rng.choice([*places(body), ({"a": 1}, "a")])
    kind = rng.randrange(8)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + rng.choice((b"\xff", b"\xc3", b"\0", b"\xed\xa0\x80")) + raw[at:]
    if kind == 2:
        return (
            raw[:at] + rng.choice((b'"', b"\\", b"\\ud83d", b"{", b"]", b",", b"/**/")) + raw[at:]
        )
    if kind == 3 and isinstance(container, dict):
        member = json.dumps({key: container[key]})[1:-1]
        return json.dumps(body).replace(member, f"{member}, {member}", 1).encode()
    if kind == 4:
        return rng.choice((b"", b"null", b"[]", b'"a"', b"NaN", b"1e999", b"\xef\xbb\xbf" + raw))
    if kind == 5:
        return text.encode(rng.choice(("utf-16", "utf-32")), errors="surrogatepass")
    if kind == 6:
        levels = rng.choice((150, 500, 20_000))
        value = json.dumps(container[key]).encode()
        nested = rng.choice(
            (b"[" * levels + b"]" * levels, b'{"a":' * levels + b"1" + b"}" * levels)
        )
        return json.dumps(body).encode().replace(value, nested, 1)
    return raw + raw


def message_of(reply: httpx.Response | requests.Response) -> str:
    """What an error of any of the APIs says."""
    content = reply.json()
    error = content.get("error", content.get("error_message"))
    message = error["message"] if isinstance(error, dict) else error
    assert isinstance(message, str)
    return message


def check(reply: httpx.Response | requests.Response) -> None:
    """Served, or refused with a reason."""
    assert reply.status_code < 500 or reply.status_code == 501, reply.text
    assert reply.status_code != 424, reply.text  # a generation failed
    assert "its log says how" not in reply.text, reply.text
    if reply.status_code >= 400:
        assert len(message_of(reply)) > 5, reply.text


@pytest.fixture(scope="module")
def fuzzed(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    """A server of our own, since adapters are loaded, named and merged; its template has tools."""
    root = tmp_path_factory.mktemp("fuzzed")
    folder = shutil.copytree(tiny_llama, root / "tiny-llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": QWEN}))
    adapters = AdapterConfig(store=root / "store")
    with LiveServer(folder, engine=ROOMY, adapters=adapters, http=GATEWAY) as server:
        server.upload_all(
            {name: zoo[name] for name in ("say-owl", "say-bat", "random-a", "heads-2")}
        )
        yield server


@pytest.fixture
def url(fuzzed: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its address; behind the test it must be idle and generate."""
    monkeypatch.setattr(health, "PATIENCE", PATIENCE)  # a busy machine takes its time
    url = f"http://{fuzzed.server.http_address}"
    yield url
    fuzzed.assert_idle()
    body = {"model": "say-owl", "prompt": "hello", "max_tokens": 5, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
    assert "owl" in reply.json()["choices"][0]["text"]


def test_the_bodies_to_mutate_are_valid_and_of_every_route(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json", timeout=PATIENCE).json()
    posts = {path for path, methods in described["paths"].items() if "post" in methods}
    assert posts == set(VALID)
    refused = []
    for path, bodies in VALID.items():
        for body in bodies:
            reply = httpx.post(url + path, json=body, timeout=PATIENCE)
            if reply.status_code != 200:
                refused.append((path, reply.text))
    assert refused == []


@pytest.mark.parametrize("num_bodies", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(1800)
def test_mutated_bodies(url: str, num_bodies: int) -> None:
    asyncio.run(send_all(url, num_bodies))


async def send_all(url: str, num_bodies: int) -> None:
    """Over connections that are kept, each with a share of the bodies."""

    async def send_share(seed: int) -> None:
        rng = random.Random(seed)
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
            for _ in range(num_bodies // NUM_CONNECTIONS):
                path = rng.choice(list(VALID))
                raw = mutate(rng, rng.choice(VALID[path]))
                reply = await asyncio.wait_for(client.post(path, content=raw), PATIENCE)
                try:
                    check(reply)
                except Exception as error:
                    error.add_note(f"POST {path} {raw[:3000]!r}")
                    raise

    async with asyncio.TaskGroup() as group:
        for seed in range(NUM_CONNECTIONS):
            group.create_task(send_share(seed))


def test_bodies_of_the_description(url: str) -> None:
    described = httpx.get(f"{url}/openapi.json", timeout=PATIENCE).json()
    with requests.Session() as session:
        for found in schemathesis.openapi.from_dict(described).get_all_operations():
            send_examples(found.ok(), url, session)


def send_examples(
    operation: APIOperation[Any, Any, Any, Any], url: str, session: requests.Session
) -> None:
    """The same ones each time."""

    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case: Case) -> None:
        bound(case)
        reply = session.request(timeout=PATIENCE, **case.as_transport_kwargs(base_url=url))
        check(reply)

    send()


def bound(case: Case) -> None:
    """A few tokens each; the defaults go up to the whole context."""
    if not isinstance(case.body, dict):
        return
    if case.operation.path in ("/", "/generate", "/generate_stream"):
        given = case.body.get("parameters") or {}
        case.body["parameters"] = {**given, "max_new_tokens": MAX_TOKENS}
    elif "prompt" in case.body or "messages" in case.body:
        case.body.pop("max_completion_tokens", None)
        case.body["max_tokens"] = MAX_TOKENS
