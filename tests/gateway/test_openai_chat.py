"""OpenAI's chats and formats, judged by its own unmodified client."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from tests.gateway.openai_asks import CHAT, GREEDY, LIMIT, PROMPT, direct, direct_chat
from tests.helpers.live import LiveServer


class Answer(BaseModel):
    """What the model must fill in."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]
    sure: bool


def test_parse_gives_the_model_that_was_asked_for(client: OpenAI, base: str) -> None:
    made = client.chat.completions.parse(
        model=base, messages=CHAT, response_format=Answer, temperature=0, max_tokens=64
    )
    assert isinstance(made.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(
        model=base, messages=CHAT, response_format=Answer, temperature=0, max_tokens=64
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == made.choices[0].message.parsed


def test_formats_by_other_names(client: OpenAI, base: str) -> None:
    schema = Answer.model_json_schema()
    for extra in (
        {"guided_json": schema},
        {"structured_outputs": {"json": schema}},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"response_format": {"type": "json", "value": schema}},
    ):
        made = client.chat.completions.create(
            model=base, messages=CHAT, temperature=0, max_tokens=64, extra_body=extra
        )
        Answer.model_validate_json(made.choices[0].message.content or "")
    made_text = client.completions.create(
        model=base, prompt=PROMPT, extra_body={"guided_regex": "[a-c]{3}"}, **GREEDY
    )
    assert made_text.choices[0].text.strip("abc") == ""


def test_a_content_of_parts_is_joined(client: OpenAI, base: str) -> None:
    parts: Any = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}],
        },
    ]
    text: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello\nthere"},
    ]
    made = [
        client.chat.completions.create(model=base, messages=each, **GREEDY)
        for each in (parts, text)
    ]
    assert made[0].choices[0].message.content == made[1].choices[0].message.content
    assert made[0].usage == made[1].usage or made[0].usage is not None


def test_a_chat_of_several_choices_streams_each(client: OpenAI, base: str) -> None:
    asked: Any = {"model": base, "messages": CHAT, "n": 3, "seed": 5, "max_tokens": LIMIT}
    whole = client.chat.completions.create(**asked)
    texts, reasons = ["", "", ""], [None, None, None]
    for part in client.chat.completions.create(**asked, stream=True):
        choice = part.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [each.message.content for each in whole.choices]
    assert reasons == [each.finish_reason for each in whole.choices]
    assert whole.id.startswith("chatcmpl-") and len(set(texts)) > 1


def test_the_async_client(served: LiveServer, base_url: str, base: str) -> None:
    expected, expected_chat = direct(served).text, direct_chat(served).text

    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="x", max_retries=0) as client:
            made = await client.completions.create(model=base, prompt=PROMPT, **GREEDY)
            assert made.choices[0].text == expected
            chat = await client.chat.completions.create(model=base, messages=CHAT, **GREEDY)
            assert chat.choices[0].message.content == expected_chat
            parts = await client.completions.create(
                model=base, prompt=PROMPT, stream=True, **GREEDY
            )
            assert "".join([part.choices[0].text async for part in parts]) == expected
            deltas = await client.chat.completions.create(
                model=base, messages=CHAT, stream=True, **GREEDY
            )
            joined = "".join([each.choices[0].delta.content or "" async for each in deltas])
            assert joined == expected_chat
            parsed = await client.chat.completions.parse(
                model=base, messages=CHAT, response_format=Answer, temperature=0, max_tokens=64
            )
            assert isinstance(parsed.choices[0].message.parsed, Answer)

    asyncio.run(run())
