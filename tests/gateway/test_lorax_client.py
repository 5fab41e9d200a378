"""The published lorax-client against a live server: it gets what gRPC's own callers get."""

from __future__ import annotations

from typing import Any

import pytest

from lorastack.v1 import generation_pb2 as pb
from tests.gateway.words import END_REASONS, in_text
from tests.helpers.foreign import lorax_calls
from tests.helpers.live import LiveServer, ask

METHODS = [
    (client, method) for client in ("sync", "async") for method in ("generate", "generate_stream")
]
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
FORMAT = pb.ResponseFormat(
    json_schema='{"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}'
)
SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "typical_p": 0.9, "seed": 7}
PENALISED = {"repetition_penalty": 1.3}

# What lorax-client is asked, and the same of gRPC.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "a LoRA": ({"adapter_id": "say-owl"}, {"stack": [("say-owl", 1.0)]}),
    "a LoRA of the store": (
        {"adapter_id": "random-a", "adapter_source": "local"},
        {"stack": [("random-a", 1.0)]},
    ),
    "heads": ({"adapter_id": "heads-wise"}, {"heads": "heads-wise"}),
    "a bundle": ({"adapter_id": "bundle"}, {"stack": [("bundle", 1.0)]}),
    "a linear merge": (
        {
            "merged_adapters": {
                "ids": ["random-a", "random-b"],
                "weights": [0.5, 0.25],
                "merge_strategy": "linear",
                "density": 0.2,
            }
        },
        {"stack": [("random-a", 0.5), ("random-b", 0.25)]},
    ),
    "sampled": ({"do_sample": True, **SAMPLED}, {"sampling": SAMPLED}),
    "sampled for its temperature": (
        {"temperature": 0.7, "seed": 3, "adapter_id": "random-a"},
        {"sampling": {"temperature": 0.7, "seed": 3}, "stack": [("random-a", 1.0)]},
    ),
    "sampled without a temperature": (
        {"do_sample": True, "seed": 3},
        {"sampling": {"temperature": 1.0, "seed": 3}},
    ),
    "greedy at temperature 0": ({"do_sample": True, "temperature": 0.0}, {}),
    "penalised": (PENALISED, {"sampling": PENALISED}),
    "stopped": (
        {"adapter_id": "say-owl", "stop_sequences": ["wlow"]},
        {"stack": [("say-owl", 1.0)], "stop": ["wlow"]},
    ),
    "a format": (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": FORMAT},
    ),
    "an end": ({"ignore_eos_token": True}, {"ignore_eos": True}),
}
PROMPT = "hello there"


@pytest.fixture(scope="module")
def answered(base_url: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(client, method, case) -> what lorax-client got; one process runs all."""
    keys = [(*method, name) for method in METHODS for name in SAME]
    cases = [
        {
            "client": client,
            "method": method,
            "arguments": {"prompt": PROMPT, "max_new_tokens": 20, **SAME[name][0]},
        }
        for client, method, name in keys
    ]
    return dict(zip(keys, lorax_calls(base_url, cases), strict=True))


@pytest.mark.parametrize("name", SAME)
def test_every_method_gets_what_grpc_gets(
    name: str, answered: dict[tuple[str, str, str], dict[str, Any]], served: LiveServer
) -> None:
    wanted = served.client.generate(
        ask(PROMPT, max_new_tokens=20, output=pb.OutputParams(logprobs=True), **SAME[name][1])
    )
    for client, method in METHODS:
        got = answered[client, method, name]
        assert "error" not in got, got
        if method == "generate":
            text, details = got["reply"]["generated_text"], got["reply"]["details"]
            tokens = details["tokens"]
        else:
            tokens = [part["token"] for part in got["parts"]]
            last = got["parts"][-1]
            text, details = last["generated_text"], last["details"]
            assert [part["generated_text"] for part in got["parts"][:-1]] == [None] * (
                len(tokens) - 1
            )
            assert text == "".join(token["text"] for token in tokens if not token["special"])
        assert text == in_text(wanted)
        assert [token["id"] for token in tokens] == list(wanted.token_ids)
        logprobs = [token.logprob for token in wanted.tokens]
        assert [token["logprob"] for token in tokens] == pytest.approx(logprobs, abs=1e-4)
        assert details["prompt_tokens"] == wanted.usage.prompt_tokens
        assert details["generated_tokens"] == len(wanted.token_ids)
        assert details["finish_reason"] == END_REASONS[wanted.finish_reason]
        sampled = "sampling" in SAME[name][1] and "seed" in SAME[name][1]["sampling"]
        assert details["seed"] == (wanted.seed if sampled else None)


def test_every_adapter_was_applied(
    answered: dict[tuple[str, str, str], dict[str, Any]],
) -> None:
    for client, method in METHODS:
        texts = {}
        for name in SAME:
            got = answered[client, method, name]
            last = got["reply"] if method == "generate" else got["parts"][-1]
            texts[name] = last["generated_text"]
        assert texts["a LoRA"].startswith("owlowl")
        changed = ("a LoRA", "a LoRA of the store", "a bundle", "a linear merge")
        assert len({texts[name] for name in ("base", *changed)}) == 1 + len(changed)


ERRORS = {
    "unknown": ({"adapter_id": "nobody"}, "NotFoundError", "nobody"),
    "unknown on the hub": ({"adapter_id": "nobody/it"}, "NotFoundError", "nobody/it"),
    "in a merge": (
        {"merged_adapters": {"ids": ["random-a", "nobody"], "weights": [1, 1], "density": 0.5}},
        "NotFoundError",
        "nobody",
    ),
    "source": ({"adapter_id": "say-owl", "adapter_source": "s3"}, "ValidationError", "s3"),
    "watermark": ({"watermark": True}, "ValidationError", "watermark"),
    "too long": ({"max_new_tokens": 10**8}, "ValidationError", "max_new_tokens"),
}


def test_refusals_are_the_clients_own_errors(base_url: str) -> None:
    keys = [(*method, name) for method in METHODS for name in ERRORS]
    cases = [
        {"client": client, "method": method, "arguments": {"prompt": PROMPT, **ERRORS[name][0]}}
        for client, method, name in keys
    ]
    for (_, _, name), got in zip(keys, lorax_calls(base_url, cases), strict=True):
        _, error, word = ERRORS[name]
        assert got["error"] == error, got
        assert word in got["message"]


def test_several_replies_are_refused_by_name(base_url: str) -> None:
    arguments = {"prompt": PROMPT, "best_of": 2, "temperature": 0.5}
    cases = [
        {"client": client, "method": "generate", "arguments": arguments}
        for client in ("sync", "async")
    ]
    for got in lorax_calls(base_url, cases):
        assert (got["error"], "best_of" in got["message"]) == ("ValidationError", True)


def test_alternatives_and_the_whole_prompt_come_as_asked(base_url: str, served: LiveServer) -> None:
    given = {"prompt": PROMPT, "max_new_tokens": 6, "return_k_alternatives": 3, "truncate": 4}
    case = {"method": "generate", "arguments": {**given, "return_full_text": True}}
    wanted = served.client.generate(
        ask(
            served.tokenize(PROMPT)[-4:],
            max_new_tokens=6,
            output=pb.OutputParams(logprobs=True, top_logprobs=3),
        )
    )
    for got in lorax_calls(base_url, [{"client": kind, **case} for kind in ("sync", "async")]):
        assert got["reply"]["generated_text"] == PROMPT + wanted.text
        details = got["reply"]["details"]
        assert details["prompt_tokens"] == 4
        for token, theirs in zip(wanted.tokens, details["tokens"], strict=True):
            assert [each["id"] for each in theirs["alternative_tokens"]] == [
                each.id for each in token.top
            ]


def test_the_prompts_numbers_are_grpcs(base_url: str, served: LiveServer) -> None:
    asked = {"prompt": PROMPT, "adapter_id": "random-a", "max_new_tokens": 3}
    case = {"method": "generate", "arguments": {**asked, "decoder_input_details": True}}
    output = pb.OutputParams(logprobs=True, prompt_logprobs=True)
    wanted = served.client.generate(
        ask(PROMPT, stack=[("random-a", 1.0)], max_new_tokens=3, output=output)
    ).prompt_tokens
    assert [token.id for token in wanted] == served.tokenize(PROMPT)
    for got in lorax_calls(base_url, [{"client": kind, **case} for kind in ("sync", "async")]):
        prefill = got["reply"]["details"]["prefill"]
        assert [(token["id"], token["text"]) for token in prefill] == [
            (token.id, token.text) for token in wanted
        ]
        assert prefill[0]["logprob"] is None  # there is nothing before it
        logprobs = [token["logprob"] for token in prefill[1:]]
        assert logprobs == pytest.approx([token.logprob for token in wanted[1:]], abs=1e-4)


@pytest.mark.parametrize("strategy", ["ties", "dare_linear", "dare_ties"])
def test_a_merge_of_another_strategy_is_the_servers(
    strategy: str, base_url: str, served: LiveServer
) -> None:
    ids, weights = ["say-owl", "say-bat"], [0.5, 0.25]
    given = {"ids": ids, "weights": weights, "merge_strategy": strategy, "density": 0.4}
    case = {
        "method": "generate",
        "arguments": {"prompt": PROMPT, "max_new_tokens": 8, "merged_adapters": given},
    }
    loras = [
        pb.LoraRef(lora_id=lora_id, scale=weight)
        for lora_id, weight in zip(ids, weights, strict=True)
    ]
    merged = served.client.merge(loras, strategy, 0.4)  # type: ignore[arg-type]
    wanted = served.client.generate(ask(PROMPT, stack=[(merged.id, 1.0)], max_new_tokens=8))
    for got in lorax_calls(base_url, [{"client": kind, **case} for kind in ("sync", "async")]):
        assert got["reply"]["generated_text"] == wanted.text
