"""GenerateRequest field by field: what is refused, what is neutral, what arrives."""

from __future__ import annotations

from typing import Any

import pytest

from lorastack.errors import InvalidArgumentError, LorastackError, Reason
from lorastack.layout import ModelShapes
from lorastack.request import (
    MAX_LORAS,
    GeneratedToken,
    PromptToken,
    RowEvent,
    SamplingParams,
    SpeculationParams,
    TokenLogprobs,
    TokenSource,
    TypicalAcceptance,
)
from lorastack.service.calls import convert
from lorastack.service.calls.call import Chat, GenerateCall, Ids, Text
from lorastack.service.calls.served import ServedModel
from lorastack.service.edge import limits
from lorastack.text.grammar import JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2 as pb
from tests.service.fakes import MAX_CONTEXT, served_model

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer, shapes: ModelShapes) -> ServedModel:
    return served_model(tokenizer, shapes)


def call(model: ServedModel, **fields: Any) -> GenerateCall:
    if not fields.keys() & {"prompt", "token_ids", "chat", "no_input"}:
        fields["prompt"] = "hello"
    fields.pop("no_input", None)
    return convert.generate_call(pb.GenerateRequest(**fields), "id", model)


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": pb.SamplingParams(**fields)}


def typical(**fields: Any) -> dict[str, Any]:
    return {"speculation": pb.Speculation(acceptance=pb.TYPICAL, **fields)}


def stop(**fields: Any) -> dict[str, Any]:
    return {"stop": pb.StopParams(**fields)}


def loras(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"loras": [pb.LoraRef(**entry) for entry in entries]}


def response_format(**fields: str) -> dict[str, Any]:
    return {"response_format": pb.ResponseFormat(**fields)}


INVALID: list[tuple[str, dict[str, Any]]] = [
    ("input", {"no_input": True}),
    ("prompt", {"prompt": ""}),
    ("token_ids", {"token_ids": pb.TokenIds()}),
    ("token_ids", {"token_ids": pb.TokenIds(ids=[1, 1 << 20])}),
    ("chat.messages", {"chat": pb.ChatMessages()}),
    ("chat.messages.role", {"chat": pb.ChatMessages(messages=[pb.ChatMessage(content="x")])}),
    ("loras", {"lora_id": "a", **loras({"lora_id": "b"})}),
    ("loras.lora_id", loras({})),
    ("loras.scale", loras({"lora_id": "a", "scale": NAN})),
    ("loras.scale", loras({"lora_id": "a", "scale": -INF})),
    ("loras.scale", loras({"lora_id": "a", "scale": 1.1e6})),
    ("loras.scale", loras({"lora_id": "a", "scale": -3e38})),
    ("loras", loras({"lora_id": "a"}, {"lora_id": "a", "scale": 2})),
    ("loras", loras(*({"lora_id": f"a{n}"} for n in range(MAX_LORAS + 1)))),
    ("sampling.temperature", sampling(temperature=-0.5)),
    ("sampling.temperature", sampling(temperature=NAN)),
    ("sampling.temperature", sampling(temperature=INF)),
    ("sampling.top_p", sampling(top_p=0)),
    ("sampling.top_p", sampling(top_p=1.01)),
    ("sampling.top_p", sampling(top_p=NAN)),
    ("sampling.min_p", sampling(min_p=-0.1)),
    ("sampling.min_p", sampling(min_p=1.1)),
    ("sampling.min_p", sampling(min_p=NAN)),
    ("sampling.typical_p", sampling(typical_p=0)),
    ("sampling.typical_p", sampling(typical_p=1.01)),
    ("sampling.typical_p", sampling(typical_p=NAN)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=0)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=-1)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=INF)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=1e-38)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=3e38)),
    ("sampling.repetition_penalty", sampling(repetition_penalty=NAN)),
    ("sampling.frequency_penalty", sampling(frequency_penalty=2.01)),
    ("sampling.frequency_penalty", sampling(frequency_penalty=NAN)),
    ("sampling.presence_penalty", sampling(presence_penalty=-2.01)),
    ("sampling.presence_penalty", sampling(presence_penalty=NAN)),
    ("sampling.logit_bias", sampling(logit_bias={1: 100.5})),
    ("sampling.logit_bias", sampling(logit_bias={1: -INF})),
    ("sampling.logit_bias", sampling(logit_bias={1: NAN})),
    ("sampling.logit_bias", sampling(logit_bias={1 << 31: 1.0})),
    ("sampling.logit_bias", sampling(logit_bias=dict.fromkeys(range(1025), 0.0))),
    ("stop.max_new_tokens", stop(max_new_tokens=0)),
    ("stop.max_new_tokens", stop(max_new_tokens=MAX_CONTEXT + 1)),
    ("stop.stop_sequences", stop(stop_sequences=["ok", ""])),
    ("stop.stop_sequences", stop(stop_sequences=["x"] * (limits.MAX_STOP_SEQUENCES + 1))),
    ("stop.stop_sequences", stop(stop_sequences=["x" * (limits.MAX_STOP_SEQUENCE_CHARS + 1)])),
    ("stop.stop_token_ids", stop(stop_token_ids=[1 << 31])),
    ("stop.stop_token_ids", stop(stop_token_ids=range(limits.MAX_STOP_TOKEN_IDS + 1))),
    ("stop.time_limit_ms", stop(time_limit_ms=0)),
    ("speculation.max_nodes", {"speculation": pb.Speculation(max_nodes=limits.MAX_NODES + 1)}),
    ("speculation.max_nodes", {"speculation": pb.Speculation(max_nodes=(1 << 32) - 1)}),
    ("speculation.mode", {"speculation": pb.Speculation(mode=7)}),
    ("speculation.acceptance", {"speculation": pb.Speculation(acceptance=7)}),
    ("speculation.typical_epsilon", typical(typical_epsilon=0)),
    ("speculation.typical_epsilon", typical(typical_epsilon=1.01)),
    ("speculation.typical_epsilon", typical(typical_epsilon=NAN)),
    ("speculation.typical_delta", typical(typical_delta=0)),
    ("speculation.typical_delta", typical(typical_delta=INF)),
    ("speculation.typical_delta", typical(typical_delta=NAN)),
    ("speculation.typical_epsilon", {"speculation": pb.Speculation(typical_epsilon=0.1)}),
    ("speculation.typical_delta", {"speculation": pb.Speculation(typical_delta=0.1)}),
    ("output.top_logprobs", {"output": pb.OutputParams(logprobs=True, top_logprobs=21)}),
    ("output.top_logprobs", {"output": pb.OutputParams(top_logprobs=1)}),
    ("response_format.regex", response_format(regex="")),
    ("response_format.regex", response_format(regex="x" * (limits.MAX_REGEX_CHARS + 1))),
    ("response_format.json_schema", response_format(json_schema="")),
    (
        "response_format.json_schema",
        response_format(json_schema=" " * (limits.MAX_SCHEMA_CHARS + 1)),
    ),
    ("request_id", {"request_id": "two words"}),
    ("request_id", {"request_id": "line\nbreak"}),
    ("request_id", {"request_id": "x" * 129}),
]


def refusal(model: ServedModel, fields: dict[str, Any]) -> LorastackError:
    with pytest.raises(LorastackError) as caught:
        call(model, **fields)
    return caught.value


@pytest.mark.parametrize(("field", "fields"), INVALID)
def test_bad_values_are_refused_by_name(
    model: ServedModel, field: str, fields: dict[str, Any]
) -> None:
    error = refusal(model, fields)
    assert type(error) is InvalidArgumentError
    assert error.reason is Reason.INVALID_REQUEST
    assert error.metadata == {"field": field}
    assert field in error.message


def test_an_endless_id_list_is_refused_by_its_length(model: ServedModel) -> None:
    error = refusal(model, {"token_ids": pb.TokenIds(ids=[1 << 30] * (MAX_CONTEXT + 1))})
    assert error.reason is Reason.REQUEST_TOO_LARGE


def test_neutral_values_ask_for_nothing(model: ServedModel) -> None:
    neutral = call(
        model,
        **sampling(
            typical_p=1, repetition_penalty=1, frequency_penalty=0, presence_penalty=0, top_p=1
        ),
        response_format=pb.ResponseFormat(),
        output=pb.OutputParams(),
        stop=pb.StopParams(),
        speculation=pb.Speculation(),
    )
    assert neutral == call(model)
    assert neutral.sampling == SamplingParams()
    assert neutral.speculation == SpeculationParams()
    assert (neutral.max_new_tokens, neutral.num_logprobs, neutral.seeded) == (None, None, False)


def test_all_values_arrive(model: ServedModel) -> None:
    full = call(
        model,
        **loras({"lora_id": "a", "scale": 0.5}, {"lora_id": "b"}),
        medusa_id="m",
        **sampling(
            temperature=0.5,
            top_k=7,
            top_p=0.25,
            min_p=0.125,
            typical_p=0.75,
            repetition_penalty=1.5,
            frequency_penalty=-2,
            presence_penalty=2,
            logit_bias={8: 100, 5: -100},
            seed=(1 << 64) - 1,
        ),
        **stop(
            max_new_tokens=9,
            stop_sequences=["x", "y"],
            stop_token_ids=[3, 4],
            ignore_eos=True,
            time_limit_ms=1500,
        ),
        speculation=pb.Speculation(max_nodes=limits.MAX_NODES),
        output=pb.OutputParams(logprobs=True, top_logprobs=20, return_prompt=True),
    )
    assert full.input == Text("hello")
    assert full.loras == (("a", 0.5), ("b", 1.0))
    assert full.medusa_id == "m"
    assert full.sampling == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        min_p=0.125,
        typical_p=0.75,
        repetition_penalty=1.5,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        logit_bias=((5, -100.0), (8, 100.0)),
        seed=(1 << 64) - 1,
    )
    assert full.seeded
    assert full.max_new_tokens == 9
    assert full.stop.stop_sequences == ("x", "y")
    assert full.stop.stop_token_ids == {3, 4}
    assert full.stop.ignore_eos
    assert full.stop.time_limit == 1.5
    assert full.speculation == SpeculationParams(enabled=True, max_nodes=63)
    assert (full.num_logprobs, full.return_prompt) == (20, True)


@pytest.mark.parametrize("logprobs", [False, True])
def test_top_logprobs_go_with_either_list(model: ServedModel, logprobs: bool) -> None:
    output = pb.OutputParams(prompt_logprobs=True, top_logprobs=3, logprobs=logprobs)
    asked = call(model, output=output)
    assert (asked.num_prompt_logprobs, asked.num_logprobs) == (3, 3 if logprobs else None)
    assert call(model, output=pb.OutputParams(logprobs=True)).num_prompt_logprobs is None


def test_long_lists_are_made_in_pieces() -> None:
    """Others have their turn between two; nothing is lost."""
    top = tuple((index, -1.0) for index in range(20))
    token = PromptToken(id=1, logprobs=TokenLogprobs(logprob=-1.0, top=top))
    events = [RowEvent(request_id="id", prompt_tokens=(token,) * 64)] * 9
    pieces = list(convert.in_pieces(events))
    assert [event for piece in pieces for event in piece] == events
    assert {len(piece) for piece in pieces} == {1, 2}
    assert list(convert.in_pieces(events[:1])) == [events[:1]]


def test_formats_arrive_as_they_are(model: ServedModel) -> None:
    longest = "x" * limits.MAX_REGEX_CHARS
    assert call(model, **response_format(regex=longest)).response_format == Regex(longest)
    # Whether it is a schema at all is seen off the event loop.
    assert call(model, **response_format(json_schema="{")).response_format == JsonSchema("{")


def test_the_other_inputs(model: ServedModel) -> None:
    assert call(model, token_ids=pb.TokenIds(ids=[3, 1])).input == Ids((3, 1))
    messages = [pb.ChatMessage(role="system", content=""), pb.ChatMessage(role="user", content="x")]
    chat = call(model, chat=pb.ChatMessages(messages=messages)).input
    assert chat == Chat((("system", ""), ("user", "x")))


def test_no_nodes_is_no_speculation(model: ServedModel) -> None:
    off = call(model, speculation=pb.Speculation(mode=pb.OFF)).speculation
    assert not off.enabled
    assert call(model, speculation=pb.Speculation(max_nodes=0)).speculation == off


def test_typical_acceptance_is_opt_in(model: ServedModel) -> None:
    assert call(model, **typical()).speculation.typical == TypicalAcceptance()
    given = call(model, **typical(typical_epsilon=0.25, typical_delta=1.5)).speculation.typical
    assert given == TypicalAcceptance(epsilon=0.25, delta=1.5)
    assert call(model, speculation=pb.Speculation()).speculation.typical is None


def test_a_top_k_of_the_whole_vocabulary_is_no_limit(model: ServedModel) -> None:
    assert call(model, **sampling(top_k=model.vocab_size)).sampling.top_k == 0
    assert call(model, **sampling(top_k=model.vocab_size - 1)).sampling.top_k != 0


def test_scale_zero_is_a_scale(model: ServedModel) -> None:
    assert call(model, **loras({"lora_id": "a", "scale": 0})).loras == (("a", 0.0),)


def test_a_reply_names_its_tokens(tokenizer: Tokenizer) -> None:
    bos, the, *_ = tokenizer.encode("the")
    unknown = tokenizer.vocab_size + 5
    tokens = (
        GeneratedToken(
            id=the,
            source=TokenSource.HEADS,
            logprobs=TokenLogprobs(logprob=-0.5, top=((the, -0.5), (bos, -1.0))),
        ),
        GeneratedToken(id=bos, source=TokenSource.MODEL),
        GeneratedToken(id=unknown, source=TokenSource.MODEL),
    )
    events = [
        RowEvent(request_id="id", text="the", tokens=tokens[:2]),
        RowEvent(request_id="id", tokens=tokens[2:]),
    ]
    part = convert.stream_part(events, tokenizer)
    assert (part.text, list(part.token_ids)) == ("the", [the, bos, unknown])
    assert [(t.text, t.special, t.source) for t in part.tokens] == [
        ("the", False, pb.Token.HEADS),
        ("<s>", True, pb.Token.MODEL),
        ("", False, pb.Token.MODEL),
    ]
    assert [top.text for top in part.tokens[0].top] == ["the", "<s>"]
