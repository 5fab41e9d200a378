"""Chunks made fast against the plain way; log-probabilities; bodies that would hold up others."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.errors import InternalError, InvalidArgumentError, ResourceExhaustedError
from lorastack.gateway.exchange import MAX_KEYS, MAX_VALUES, parsed
from lorastack.gateway.openai.bodies import CompletionBody
from lorastack.gateway.openai.refusals import failed, refuse
from lorastack.gateway.openai.replies import (
    LOWEST,
    TEXT,
    Chunks,
    Head,
    chat_logprobs,
    completion_logprobs,
)
from lorastack.v1 import generation_pb2 as pb


@given(
    text=st.text(),
    model=st.text(st.characters(exclude_categories=["Cs"])),
    with_usage=st.booleans(),
)
def test_a_fast_chunk_is_the_plain_one(text: str, model: str, with_usage: bool) -> None:
    head = Head("cmpl-1", "text_completion", 1, model, "sha256:0")
    choice = {"index": 3, "text": TEXT, "logprobs": None, "finish_reason": None}
    more = {"usage": None} if with_usage else {}
    plain = head.chunk([{**choice, "text": text}], **more)
    assert Chunks(head, choice, with_usage).chunk(text) == plain


def test_logprobs_that_json_cannot_hold() -> None:
    part = pb.Token(id=1, text="\ufffd", logprob=float("-inf"))
    part.top.add(id=2, text="a", logprob=-1)
    (entry,) = chat_logprobs([part], 1)["content"]
    assert (entry["logprob"], entry["bytes"]) == (LOWEST, None)
    assert entry["top_logprobs"] == [{"token": "a", "logprob": -1, "bytes": [97]}]
    told = completion_logprobs([pb.Token(id=7, text="<s>"), part], 4)
    assert told == {
        "text_offset": [4, 7],
        "token_logprobs": [None, LOWEST],
        "tokens": ["<s>", "\ufffd"],
        "top_logprobs": [None, {"a": -1, "\ufffd": LOWEST}],
    }


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1] * (MAX_VALUES + 2)},
        {"prompt": "a", "metadata": {str(key): "" for key in range(MAX_KEYS)}},
    ],
)
def test_a_body_of_too_many_values_is_refused_unread(body: dict[str, object]) -> None:
    raw = json.dumps({"model": "m", **body}).encode()
    with pytest.raises(InvalidArgumentError, match="values or"):
        parsed(CompletionBody, raw)


def test_text_is_no_value() -> None:
    text = '{"a": 1, "\\": 2},' * (MAX_VALUES // 8)
    raw = json.dumps({"model": "m", "prompt": text}).encode()
    assert parsed(CompletionBody, raw).prompt == text
    with pytest.raises(InvalidArgumentError):
        parsed(CompletionBody, b'"' + b'\\"' * 1_000_000)  # at once, however many quotes


def test_errors_are_openais() -> None:
    full = refuse(ResourceExhaustedError("full"), 429)["error"]
    assert (full["type"], full["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    first, last, rest = failed(InternalError("oh")).decode().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["error"]["message"] == "oh"
    assert (last, rest) == ("data: [DONE]", "")
