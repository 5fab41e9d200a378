"""The published huggingface_hub.InferenceClient against a live server, as against TGI."""

from __future__ import annotations

import asyncio
import json

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from lorastack.v1 import generation_pb2 as pb
from tests.gateway.words import END_REASONS, in_text
from tests.helpers.live import LiveServer, ask

PROMPT = "hello there"
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}


@pytest.fixture(scope="module")
def client(base_url: str) -> InferenceClient:
    return InferenceClient(base_url=base_url)


def test_text_is_what_grpc_gives(client: InferenceClient, served: LiveServer) -> None:
    wanted = served.client.generate(ask(PROMPT, stack=[("say-owl", 1.0)], max_new_tokens=20))
    given = {"adapter_id": "say-owl", "max_new_tokens": 20}
    assert client.text_generation(PROMPT, **given) == wanted.text
    assert "".join(client.text_generation(PROMPT, stream=True, **given)) == wanted.text
    assert client.text_generation(PROMPT, max_new_tokens=20) != wanted.text


@pytest.mark.parametrize("stop", [None, ["wlow"]])
def test_details_are_what_grpc_gives(
    client: InferenceClient, served: LiveServer, stop: list[str] | None
) -> None:
    wanted = served.client.generate(
        ask(
            PROMPT,
            stack=[("say-owl", 1.0)],
            max_new_tokens=20,
            stop=stop or (),
            sampling={"temperature": 0.9, "seed": 5, "frequency_penalty": 0.5},
            output=pb.OutputParams(logprobs=True, top_logprobs=2),
        )
    )
    given = {
        "adapter_id": "say-owl",
        "max_new_tokens": 20,
        "stop": stop,
        "temperature": 0.9,
        "seed": 5,
        "frequency_penalty": 0.5,
        "top_n_tokens": 2,
    }
    whole = client.text_generation(PROMPT, details=True, **given)
    parts = list(client.text_generation(PROMPT, details=True, stream=True, **given))
    assert whole.generated_text == parts[-1].generated_text == in_text(wanted)
    assert [part.index for part in parts] == list(range(1, len(parts) + 1))
    assert parts[-1].details.input_length == wanted.usage.prompt_tokens
    for details, tokens, top in (
        (whole.details, whole.details.tokens, whole.details.top_tokens),
        (
            parts[-1].details,
            [part.token for part in parts],
            [[vars(each) for each in part.top_tokens] for part in parts],
        ),
    ):
        assert [token.id for token in tokens] == list(wanted.token_ids)
        listed = [[each["id"] for each in likely] for likely in top]
        assert listed == [[each.id for each in token.top] for token in wanted.tokens]
        assert details.finish_reason == END_REASONS[wanted.finish_reason]
        assert details.generated_tokens == len(wanted.token_ids)
        assert details.seed == 5


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}},
        {"type": "regex", "value": r'\{"n": (1|22)\}'},
    ],
)
def test_a_grammar_holds(client: InferenceClient, grammar: dict[str, object]) -> None:
    text = client.text_generation(PROMPT, grammar=grammar, max_new_tokens=40)
    assert json.loads(text)["n"] in (1, 22)


def test_what_is_wrong_is_the_clients_own_error(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="watermark"):
        client.text_generation(PROMPT, watermark=True)
    with pytest.raises(Exception, match="nobody"):
        client.text_generation(PROMPT, adapter_id="nobody")


def test_the_asynchronous_client_gets_the_same(base_url: str, served: LiveServer) -> None:
    wanted = served.client.generate(ask(PROMPT, stack=[("say-bat", 1.0)], max_new_tokens=9))

    async def both() -> tuple[str, str]:
        async with AsyncInferenceClient(base_url=base_url) as client:
            given = {"adapter_id": "say-bat", "max_new_tokens": 9}
            whole = await client.text_generation(PROMPT, **given)
            parts = await client.text_generation(PROMPT, stream=True, **given)
            return whole, "".join([part async for part in parts])

    assert asyncio.run(both()) == (wanted.text, wanted.text)
