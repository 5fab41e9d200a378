"""What the OpenAI API refuses by name, and what it takes."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.gateway.openai_asks import CHAT, GREEDY, PROMPT


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "word"),
    [
        ("completions", {"model": "nobody"}, 404, None, "nobody"),
        ("completions", {"extra_body": {"medusa_id": "nobody"}}, 404, None, "nobody"),
        ("completions", {"best_of": 4}, 400, "best_of", "best_of"),
        ("completions", {"suffix": "x"}, 400, "suffix", "not supported"),
        ("completions", {"n": 17}, 400, "n", "16"),
        ("completions", {"max_tokens": 0}, 400, "max_tokens", "echo"),
        ("completions", {"max_tokens": 10**6}, 400, "max_tokens", "context"),
        ("completions", {"prompt": []}, 400, "prompt", "prompt"),
        ("completions", {"prompt": ["a"] * 33, "n": 2}, 400, "prompt", "64"),
        ("completions", {"temperature": -1}, 400, "temperature", "temperature"),
        ("completions", {"stop": [""]}, 400, "stop", "stop"),
        ("completions", {"logit_bias": {"99999999": 1}}, 400, "logit_bias", "vocabulary"),
        ("completions", {"extra_body": {"nonsense": 1}}, 400, "nonsense", "not known"),
        ("completions", {"extra_body": {"guided_choice": ["a"]}}, 400, "guided_choice", "not supp"),
        (
            "completions",
            {"extra_body": {"loras": [{"lora_id": "random-a"}]}, "model": "say-owl"},
            400,
            "loras",
            "say-owl",
        ),
        ("completions", {"stream_options": {}}, 400, "stream_options", "stream"),
        (
            "completions",
            {"prompt": ["a"] * 64, "max_tokens": 16_000, "logprobs": 20},
            400,
            "logprobs",
            "",
        ),
        ("chat", {"n": 16, "logprobs": True, "top_logprobs": 20}, 400, "logprobs", "max_tokens"),
        ("chat", {"top_logprobs": 3}, 400, "top_logprobs", "logprobs"),
        ("chat", {"reasoning_effort": "high"}, 400, "reasoning_effort", "not supported"),
        ("chat", {"functions": [{"name": "f"}]}, 400, "functions", "not supported"),
        ("chat", {"modalities": ["audio"]}, 400, "modalities", "text"),
        ("chat", {"prediction": {"type": "content", "content": "x"}}, 400, "prediction", "not su"),
        ("chat", {"tool_choice": "required"}, 400, "tool_choice", "tools"),
        ("chat", {"max_tokens": 1, "max_completion_tokens": 2}, 400, "max_completion_tokens", ""),
        (
            "chat",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}],
                    }
                ]
            },
            400,
            "messages",
            "text",
        ),
        ("chat", {"response_format": {"type": "grammar"}}, 400, "response_format", "json_schema"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_name_the_field(
    client: OpenAI,
    base: str,
    path: str,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    word: str,
    stream: bool,
) -> None:
    asked: dict[str, Any] = {"model": base, **fields}
    if stream and param not in ("stream_options", "logprobs"):
        asked["stream"] = True
    with pytest.raises(openai.APIStatusError) as raised:
        if path == "chat":
            client.chat.completions.create(**{"messages": CHAT, **asked})
        else:
            client.completions.create(**{"prompt": PROMPT, **asked})
    error: Any = raised.value
    assert error.status_code == status, error
    assert error.param == param and word in error.message, error
    assert error.code == ("model_not_found" if status == 404 else None)
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        '"prompt": "\\ud800"',
        '"prompt": "a", "temperature": NaN',
        '"prompt": "a", "temperature": 1e300',
        '"prompt": "a", "logit_bias": {"5": NaN}',
        '"prompt": "a", "loras": [{"lora_id": "random-a", "scale": 1e300}]',
        '"prompt": "a", "stop_token_ids": [4294967295]',
        '"prompt": "a", "seed": 18446744073709551616',
        '"prompt": "a", "max_tokens": 4294967295',
        '"prompt": [4294967295]',
        '"prompt": [[]]',
        '"prompt": ""',
        '"prompt": "a", "medusa_id": "\\u0000"',
        '"prompt": "a", "model": "\\u0000"',
        '"prompt": "a", "model": "none"',
        '"prompt": "a", "response_format": {"type": "json_object", "schema": {"type": 5}}',
    ],
)
def test_odd_values_are_refused(http: httpx.Client, base: str, fields: str) -> None:
    model = "" if '"model"' in fields else f'"model": "{base}", '
    reply = http.post("/v1/completions", content=f"{{{model}{fields}}}")
    assert 400 <= reply.status_code < 500, reply.text
    assert reply.json()["error"]["message"]


def test_harmless_fields_are_taken(client: OpenAI, base: str) -> None:
    made = client.chat.completions.create(
        model=base,
        messages=CHAT,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="s",
        prompt_cache_key="k",
        modalities=["text"],
        tool_choice="none",
        **GREEDY,
    )
    assert made.choices[0].finish_reason == "length"


def test_a_stream_is_plain_server_sent_events(http: httpx.Client, base: str) -> None:
    reply = http.post(
        "/v1/completions",
        json={"model": base, "prompt": PROMPT, "stream": True, **GREEDY},
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(each.startswith("data: ") and "\n" not in each for each in events[:-1])
