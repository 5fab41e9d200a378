"""The events of LoRAX's streams, from messages however they are cut."""

from __future__ import annotations

import json
import random

import pytest

from lorastack.client import GenerateResponse, GenerateStreamResponse, Token
from lorastack.errors import InternalError, UnavailableError
from lorastack.gateway.lorax.bodies import Body, Parameters
from lorastack.gateway.lorax.refusals import failed
from lorastack.gateway.lorax.stream import EventWriter
from lorastack.text.stream import StopMatcher

END = Token(id=2, text="</s>", special=True)


def body(**parameters: object) -> Body:
    return Body(inputs="in", parameters=Parameters(details=True, **parameters))  # type: ignore[arg-type]


def token(text: str) -> Token:
    return Token(id=sum(map(ord, text)), text=text, logprob=-0.5)


def final(reason: int = GenerateResponse.LENGTH, **fields: object) -> GenerateStreamResponse:
    return GenerateStreamResponse(final=GenerateResponse(finish_reason=reason, **fields))  # type: ignore[arg-type]


def parsed(written: bytes) -> list[dict[str, object]]:
    return [json.loads(line[6:]) for line in written.decode().split("\n\n") if line]


def test_a_token_is_told_at_once_and_the_last_one_with_the_end() -> None:
    writer = EventWriter(body(max_new_tokens=2), 100)
    (first,) = parsed(writer.take(GenerateStreamResponse(text="a", tokens=[token("a")])))
    assert first["generated_text"] is None
    assert writer.take(GenerateStreamResponse(text="b", tokens=[token("b")])) == b""
    (last,) = parsed(writer.finish(final()))
    assert (last["token"]["text"], last["generated_text"]) == ("b", "ab")  # type: ignore[index]


def test_the_limit_of_the_context_ends_with_the_last_token_too() -> None:
    writer = EventWriter(body(), max_context=30)
    written = []
    for _ in range(20):
        written += parsed(writer.take(GenerateStreamResponse(text="a", tokens=[token("a")])))
    written += parsed(writer.finish(final()))
    assert len(written) == 20
    assert written[-1]["generated_text"] == "a" * 20


@pytest.mark.parametrize("seed", range(300))
def test_the_texts_of_tokens_are_the_text_however_messages_are_cut(seed: int) -> None:
    draw = random.Random(seed)
    stop = draw.choice(["", "aa", "c d", "\u2028a"])
    tokens = [token(draw.choice(["a", "bc", " d", "ca", "\u2028", "🦉"])) for _ in range(30)]
    matcher = StopMatcher([stop] if stop else [])
    writer = EventWriter(body(stop=[stop] if stop else None), 10_000)
    written, text, sent, match = b"", "", 0, None
    while match is None and sent < len(tokens):
        part = GenerateStreamResponse()
        for _ in range(draw.randint(1, 4)):
            if match is None and sent < len(tokens):
                settled, match = matcher.push(tokens[sent].text)
                part.text += settled
                part.tokens.append(tokens[sent])
                sent += 1
        if match is None and sent == len(tokens):
            part.text += matcher.flush()
            part.tokens.append(END)
        text += part.text
        written += writer.take(part)
    written += writer.finish(final(GenerateResponse.EOS, stop_match=match or ""))
    text += match or ""
    events = parsed(written)
    assert (
        "".join(
            event["token"]["text"]  # type: ignore[index]
            for event in events
            if not event["token"]["special"]  # type: ignore[index]
        )
        == text
    )
    assert events[-1]["generated_text"] == text
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    ids = [event["token"]["id"] for event in events]  # type: ignore[index]
    ended = [] if match else [END]
    assert ids == [each.id for each in (*tokens[:sent], *ended)]


def test_what_breaks_a_stream_is_an_event_of_a_known_type() -> None:
    assert parsed(failed(UnavailableError("gone"))) == [
        {"error": "gone", "error_type": "incomplete_generation"}
    ]
    with pytest.raises(InternalError):
        EventWriter(body(), 100).finish(final(GenerateResponse.CANCELLED))
