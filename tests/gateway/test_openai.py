"""OpenAI's models and completions, judged by its own unmodified client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from huggingface_hub import InferenceClient
from openai import OpenAI

from tests.gateway.openai_asks import CHAT, GREEDY, LIMIT, PROMPT, direct, direct_chat
from tests.helpers.live import LiveServer, ask


def test_models_lists_the_base_and_its_adapters(
    client: OpenAI, served: LiveServer, base: str
) -> None:
    models: dict[str, Any] = {model.id: model for model in client.models.list()}
    assert set(models) == {base, *(adapter.id for adapter in served.client.list_adapters())}
    assert served.digests.keys() <= models.keys()
    assert models[base].parent is None
    assert models["say-owl"].parent == base
    assert models["say-owl"].root == served.digests["say-owl"]
    assert models["say-owl"].created > 1_600_000_000
    assert models[base].max_model_len == served.client.model_info().limits.max_context
    for name in (base, "say-owl"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("no/body")


@pytest.mark.parametrize("name", ["", "say-owl", "bundle"])
def test_model_chooses_the_adapter(
    client: OpenAI, served: LiveServer, base: str, name: str
) -> None:
    expected = direct(served, stack=[(name, 1.0)] if name else [])
    made: Any = client.completions.create(model=name or base, prompt=PROMPT, **GREEDY)
    assert made.choices[0].text == expected.text
    assert made.model == (name or base)
    assert made.system_fingerprint == served.client.model_info().fingerprint
    assert made.usage.prompt_tokens == expected.usage.prompt_tokens
    assert made.usage.completion_tokens == expected.usage.generated_tokens
    assert [each["lora_id"] for each in made.lorastack["loras"]] == [name] * bool(name)
    assert made.lorastack["medusa_id"] == expected.adapters.medusa_id
    if name == "say-owl":
        assert "owl" in made.choices[0].text

    expected = direct_chat(served, name)
    chat = client.chat.completions.create(model=name or base, messages=CHAT, **GREEDY)
    assert chat.choices[0].message.content == expected.text
    streamed = client.chat.completions.create(
        model=name or base, messages=CHAT, stream=True, **GREEDY
    )
    assert "".join(each.choices[0].delta.content or "" for each in streamed) == expected.text


def test_heads_are_a_model_too(client: OpenAI, served: LiveServer, base: str) -> None:
    made: Any = client.completions.create(model="heads-owl", prompt=PROMPT, **GREEDY)
    assert made.lorastack["medusa_id"] == "heads-owl"
    assert made.choices[0].text == direct(served).text


@pytest.mark.parametrize(
    "extra",
    [
        {"loras": [{"lora_id": "say-owl", "scale": 1.0}, {"lora_id": "random-a", "scale": 0.5}]},
        {"lora": [{"id": "say-owl", "scale": 1.0}, {"id": "random-a", "scale": 0.5}]},
    ],
)
def test_a_stack_goes_in_extra_body(
    client: OpenAI, served: LiveServer, base: str, extra: Any
) -> None:
    expected = direct(served, stack=[("say-owl", 1.0), ("random-a", 0.5)])
    made: Any = client.completions.create(model=base, prompt=PROMPT, extra_body=extra, **GREEDY)
    assert made.choices[0].text == expected.text
    assert {(each["lora_id"], each["scale"]) for each in made.lorastack["loras"]} == {
        ("say-owl", 1.0),
        ("random-a", 0.5),
    }


def test_heads_and_speculation_go_in_extra_body(client: OpenAI, served: LiveServer) -> None:
    def made(**extra: Any) -> Any:
        return client.completions.create(model="say-owl", prompt=PROMPT, extra_body=extra, **GREEDY)

    expected = direct(served, stack=[("say-owl", 1.0)])
    drafted, off = made(medusa_id="heads-owl"), made(speculation="off")
    nodes = made(medusa_id="heads-owl", speculation={"mode": "auto", "max_nodes": 2})
    assert {each.choices[0].text for each in (drafted, off, nodes)} == {expected.text}
    assert drafted.lorastack["medusa_id"] == "heads-owl"
    assert off.lorastack["speculation"]["drafted_tokens"] == 0


def test_a_streamed_completion_joins_to_the_whole_one(
    client: OpenAI, served: LiveServer, base: str
) -> None:
    expected = direct(served)
    parts: list[Any] = list(
        client.completions.create(
            model=base,
            prompt=PROMPT,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == LIMIT
    assert all(part.usage is None for part in parts[:-1])
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected.text
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
    assert len({part.id for part in parts}) == 1 and parts[0].id.startswith("cmpl-")


def test_several_prompts_and_choices_come_in_order(
    client: OpenAI, served: LiveServer, base: str
) -> None:
    ids = served.tokenize(PROMPT)
    whole: Any = client.completions.create(model=base, prompt=[PROMPT, "a"], n=2, **GREEDY)
    assert [each.index for each in whole.choices] == [0, 1, 2, 3]
    first, second = direct(served).text, direct(served, prompt="a").text
    assert [each.text for each in whole.choices] == [first, first, second, second]
    assert whole.usage.prompt_tokens == len(ids) + len(served.tokenize("a"))
    by_ids = client.completions.create(model=base, prompt=[ids], **GREEDY)
    assert by_ids.choices[0].text == first
    assert client.completions.create(model=base, prompt=ids, **GREEDY).choices[0].text == first
    texts = ["", "", "", ""]
    for part in client.completions.create(
        model=base, prompt=[PROMPT, "a"], n=2, stream=True, **GREEDY
    ):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == [first, first, second, second]


def test_choices_are_drawn_with_seeds_that_count(
    client: OpenAI, served: LiveServer, base: str
) -> None:
    made: Any = client.completions.create(
        model=base, prompt=PROMPT, n=3, seed=-1, temperature=1.5, max_tokens=LIMIT
    )
    assert made.lorastack["seeds"] == [2**64 - 1, 0, 1]
    for choice, seed in zip(made.choices, made.lorastack["seeds"], strict=True):
        sampling = {"temperature": 1.5, "seed": seed}
        assert choice.text == direct(served, sampling=sampling).text
    assert len({choice.text for choice in made.choices}) > 1


def test_parameters_reach_the_sampler(client: OpenAI, served: LiveServer, base: str) -> None:
    sampling = {
        "temperature": 0.9,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "typical_p": 0.95,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
        "logit_bias": {5: 10.0, 6: 10.0},
        "seed": 7,
    }
    expected = direct(served, sampling=sampling, ignore_eos=True)
    extra = {name: sampling[name] for name in ("top_k", "min_p", "typical_p", "repetition_penalty")}
    made = client.completions.create(
        model=base,
        prompt=PROMPT,
        max_tokens=LIMIT,
        temperature=0.9,
        top_p=0.9,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={"5": 10, "6": 10},
        seed=7,
        extra_body={**extra, "ignore_eos": True},
    )
    assert made.choices[0].text == expected.text


def test_stop_ends_the_text(client: OpenAI, served: LiveServer) -> None:
    made: Any = client.completions.create(model="say-owl", prompt=PROMPT, stop=["wl"], **GREEDY)
    expected = direct(served, stack=[("say-owl", 1.0)], stop=["wl"])
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == "stop" and made.choices[0].stop_reason == "wl"


def test_logprobs_of_a_completion(client: OpenAI, served: LiveServer, base: str) -> None:
    request = ask(PROMPT, heads="", max_new_tokens=LIMIT)
    request.output.logprobs, request.output.top_logprobs = True, 2
    expected = served.client.generate(request)
    made = client.completions.create(model=base, prompt=PROMPT, logprobs=2, **GREEDY)
    told = made.choices[0].logprobs
    assert told is not None and told.tokens == [token.text for token in expected.tokens]
    assert told.token_logprobs == pytest.approx([token.logprob for token in expected.tokens])
    assert told.top_logprobs is not None and told.text_offset is not None
    assert all(1 <= len(top) <= 3 for top in told.top_logprobs)
    assert told.text_offset[:2] == [0, len(told.tokens[0])]
    streamed: list[Any] = []
    for part in client.completions.create(
        model=base, prompt=PROMPT, logprobs=2, stream=True, **GREEDY
    ):
        if part.choices[0].logprobs:
            streamed += part.choices[0].logprobs.tokens or []
    assert streamed == told.tokens


def test_logprobs_of_a_chat(client: OpenAI, base: str) -> None:
    made = client.chat.completions.create(
        model=base, messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY
    )
    told = made.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == LIMIT
    assert all(len(each.top_logprobs) == 3 for each in told.content)
    streamed: list[Any] = []
    for part in client.chat.completions.create(
        model=base, messages=CHAT, logprobs=True, top_logprobs=3, stream=True, **GREEDY
    ):
        if part.choices[0].logprobs:
            streamed += part.choices[0].logprobs.content or []
    assert [each.token for each in streamed] == [each.token for each in told.content]


def test_echo_gives_the_prompt_first(client: OpenAI, served: LiveServer, base: str) -> None:
    expected = PROMPT + direct(served).text
    ids = served.tokenize(PROMPT)
    whole = client.completions.create(model=base, prompt=PROMPT, echo=True, **GREEDY)
    assert whole.choices[0].text == expected
    by_ids = client.completions.create(model=base, prompt=ids, echo=True, **GREEDY)
    assert by_ids.choices[0].text.endswith(expected)
    parts = client.completions.create(model=base, prompt=PROMPT, echo=True, stream=True, **GREEDY)
    assert "".join(part.choices[0].text for part in parts) == expected
    alone = client.completions.create(
        model=base, prompt=PROMPT, echo=True, max_tokens=0, temperature=0
    )
    assert alone.choices[0].text == PROMPT
    assert alone.usage is not None and alone.usage.completion_tokens == 0


def test_echo_with_logprobs_scores_the_prompt(
    client: OpenAI, served: LiveServer, base: str
) -> None:
    asked: Any = {"model": base, "prompt": PROMPT, "echo": True, "logprobs": 1}
    made = client.completions.create(**asked, **GREEDY)
    told = made.choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs
    num_prompt = len(served.tokenize(PROMPT))
    assert len(told.tokens) == num_prompt + LIMIT
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(each is not None for each in told.token_logprobs[1:])
    request = ask(PROMPT, heads="", max_new_tokens=1)
    request.output.logprobs = request.output.prompt_logprobs = True
    expected = [token.logprob for token in served.client.generate(request).prompt_tokens][1:]
    assert told.token_logprobs[1:num_prompt] == pytest.approx(expected)

    text, tokens = "", []
    for part in client.completions.create(stream=True, **asked, **GREEDY):
        text += part.choices[0].text
        if part.choices[0].logprobs:
            tokens += part.choices[0].logprobs.tokens or []
    assert (text, tokens) == (made.choices[0].text, told.tokens)

    alone = client.completions.create(**asked, max_tokens=0).choices[0]
    assert alone.text == PROMPT
    assert alone.logprobs is not None and len(alone.logprobs.tokens or ()) == num_prompt


def test_an_alias_is_a_model(client: OpenAI, served: LiveServer) -> None:
    name = "team/whoever"
    served.client.alias(name, [("say-owl", 1.0), ("random-a", 0.5)], "heads-owl")
    try:
        made: Any = client.completions.create(model=name, prompt=PROMPT, **GREEDY)
        chat = client.chat.completions.create(model=name, messages=CHAT, **GREEDY)
        assert made.choices[0].text == direct(served, stack=[(name, 1.0)]).text
        assert chat.choices[0].message.content == direct_chat(served, name).text
        assert name in [model.id for model in client.models.list()]
        assert client.models.retrieve(name).id == name
    finally:
        served.client.delete_adapter(name)
    expected = direct(served, stack=[("say-owl", 1.0), ("random-a", 0.5)], heads="heads-owl")
    assert made.choices[0].text == expected.text
    assert len(made.lorastack["loras"]) == 2
    assert made.lorastack["medusa_id"] == "heads-owl"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=name, prompt=PROMPT, **GREEDY)


@pytest.mark.parametrize("placeholder", ["tgi", "dummy"])
def test_what_tgis_clients_call_the_model_is_the_base(
    client: OpenAI, served: LiveServer, placeholder: str
) -> None:
    made = client.completions.create(model=placeholder, prompt=PROMPT, **GREEDY)
    assert made.choices[0].text == direct(served).text
    served.client.alias(placeholder, [("say-owl", 1.0)])
    try:
        made = client.completions.create(model=placeholder, prompt=PROMPT, **GREEDY)
    finally:
        served.client.delete_adapter(placeholder)
    assert made.choices[0].text == direct(served, stack=[("say-owl", 1.0)]).text


def test_the_description_names_every_route(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    (parameter,) = paths["/v1/models/{model}"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"]) == ("model", "path")
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert set(paths[path]["post"]["responses"]["200"]["content"]) == {
            "application/json",
            "text/event-stream",
        }


def test_more_choices_than_the_server_has_rows(client: OpenAI, served: LiveServer) -> None:
    texts = [""] * 16
    for part in client.completions.create(
        model="say-owl", prompt=PROMPT, n=16, stream=True, **GREEDY
    ):
        texts[part.choices[0].index] += part.choices[0].text
    assert set(texts) == {direct(served, stack=[("say-owl", 1.0)]).text}


def test_the_chat_of_the_hubs_client(base_url: str, served: LiveServer) -> None:
    client = InferenceClient(base_url=base_url)
    for model in (None, "say-owl"):
        expected = direct_chat(served, model or "").text
        made = client.chat_completion(CHAT, model=model, temperature=0, max_tokens=LIMIT)
        assert made.choices[0].message.content == expected
        parts = client.chat_completion(
            CHAT, model=model, temperature=0, max_tokens=LIMIT, stream=True
        )
        assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
