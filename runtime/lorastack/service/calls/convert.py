"""GenerationService's messages on one side, our own types on the other; no other file knows both.

Requests are checked here field by field: a bad value is InvalidArgumentError that names the field.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lorastack.errors import InvalidArgumentError
from lorastack.request import (
    Final,
    FinishReason,
    GeneratedToken,
    PromptToken,
    Request,
    RowEvent,
    SamplingParams,
    SpeculationParams,
    SpeculationStats,
    StopParams,
    TokenSource,
    TypicalAcceptance,
)
from lorastack.service.calls.call import Chat, GenerateCall, Ids, Text
from lorastack.service.calls.prepare import Prepared
from lorastack.service.calls.served import ServedModel
from lorastack.service.edge import limits
from lorastack.service.watch.exposition import Part
from lorastack.text.grammar import JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2

# Tokens, and likely ones beside them, that one part of a reply is made of: some milliseconds of the
# event loop.
MOST_LISTED = 2048
_SOURCES = {
    TokenSource.MODEL: generation_pb2.Token.MODEL,
    TokenSource.HEADS: generation_pb2.Token.HEADS,
    TokenSource.PROMPT_LOOKUP: generation_pb2.Token.PROMPT_LOOKUP,
    TokenSource.GRAMMAR: generation_pb2.Token.GRAMMAR,
}
_PARTS: dict[int, Part] = {
    generation_pb2.GetMetricsRequest.ALL: Part.ALL,
    generation_pb2.GetMetricsRequest.OWN: Part.OWN,
    generation_pb2.GetMetricsRequest.ROUTERS: Part.ROUTERS,
}
_FINISH_REASONS = {
    FinishReason.LENGTH: generation_pb2.GenerateResponse.LENGTH,
    FinishReason.EOS: generation_pb2.GenerateResponse.EOS,
    FinishReason.STOP_SEQUENCE: generation_pb2.GenerateResponse.STOP_SEQUENCE,
    FinishReason.STOP_TOKEN: generation_pb2.GenerateResponse.STOP_TOKEN,
    FinishReason.CANCELLED: generation_pb2.GenerateResponse.CANCELLED,
    FinishReason.TIME_LIMIT: generation_pb2.GenerateResponse.TIME_LIMIT,
}


def generate_call(
    message: generation_pb2.GenerateRequest, request_id: str, model: ServedModel
) -> GenerateCall:
    """Checks every field and converts. request_id: the caller's or ours."""
    limits.check_request_id(message.request_id)
    sampling, stop, output = message.sampling, message.stop, message.output
    num_top = output.top_logprobs
    limits.check_logprobs(output.logprobs or output.prompt_logprobs, num_top)
    max_new_tokens = stop.max_new_tokens if stop.HasField("max_new_tokens") else None
    if max_new_tokens is not None:
        limits.check_max_new_tokens(max_new_tokens, model.max_context)
    return GenerateCall(
        request_id=request_id,
        input=prompt_input(message, model),
        loras=_loras(message),
        medusa_id=message.medusa_id,
        sampling=_sampling(sampling, model.vocab_size),
        seeded=sampling.HasField("seed"),
        max_new_tokens=max_new_tokens,
        stop=_stop(stop, model.vocab_size),
        speculation=_speculation(message.speculation),
        num_logprobs=num_top if output.logprobs else None,
        num_prompt_logprobs=num_top if output.prompt_logprobs else None,
        return_prompt=output.return_prompt,
        response_format=_response_format(message.response_format),
    )


def prompt_input(
    message: generation_pb2.GenerateRequest | generation_pb2.TokenizeRequest, model: ServedModel
) -> Text | Ids | Chat:
    """The message's `oneof input`."""
    match message.WhichOneof("input"):
        case "prompt":
            limits.check(message.prompt != "", "prompt", "a text of at least one character")
            return Text(message.prompt)
        case "token_ids":
            ids = message.token_ids.ids
            limits.check_prompt_ids(ids, model.vocab_size, model.max_context)
            return Ids(tuple(ids))
        case "chat":
            given = message.chat.messages
            limits.check_length(given, "chat.messages", limits.MAX_MESSAGES)
            messages = tuple((entry.role, entry.content) for entry in given)
            limits.check_messages(messages)
            return Chat(
                messages,
                tuple(entry.fields_json for entry in given) if _has_fields(given) else (),
                message.chat.tools_json,
                message.chat.variables_json,
            )
        case _:
            raise InvalidArgumentError(
                "the request has no input; set prompt, token_ids or chat", field="input"
            )


def metrics_part(message: generation_pb2.GetMetricsRequest) -> Part:
    """Which metrics are asked for."""
    limits.check(message.part in _PARTS, "part", "ALL, OWN or ROUTERS", message.part)
    return _PARTS[message.part]


def _has_fields(messages: Iterable[generation_pb2.ChatMessage]) -> bool:
    return any(message.fields_json for message in messages)


def _loras(message: generation_pb2.GenerateRequest) -> tuple[tuple[str, float], ...]:
    if message.lora_id:
        rule = "empty when lora_id is set; put all LoRAs into loras"
        limits.check(not message.loras, "loras", rule)
        return ((message.lora_id, 1.0),)
    limits.check_num_loras(message.loras)
    loras = tuple(
        (ref.lora_id, ref.scale if ref.HasField("scale") else 1.0) for ref in message.loras
    )
    limits.check_loras(loras)
    return loras


def _sampling(message: generation_pb2.SamplingParams, vocab_size: int) -> SamplingParams:
    biases, longest = message.logit_bias, limits.MAX_LOGIT_BIASES
    limits.check_length(biases, "sampling.logit_bias", longest)
    penalty = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    params = SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k if message.top_k < vocab_size else 0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        typical_p=message.typical_p if message.HasField("typical_p") else 1.0,
        repetition_penalty=penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple(sorted(biases.items())),
        seed=message.seed,
    )
    limits.check_sampling(params, vocab_size)
    return params


def _stop(message: generation_pb2.StopParams, vocab_size: int) -> StopParams:
    """max_new_tokens is left to `prepare`, which knows the prompt's length."""
    sequences, ids = message.stop_sequences, message.stop_token_ids
    limits.check_length(sequences, "stop.stop_sequences", limits.MAX_STOP_SEQUENCES)
    limits.check_length(ids, "stop.stop_token_ids", limits.MAX_STOP_TOKEN_IDS)
    limited = message.HasField("time_limit_ms")
    params = StopParams(
        max_new_tokens=0,
        stop_sequences=tuple(sequences),
        stop_token_ids=frozenset(ids),
        ignore_eos=message.ignore_eos,
        time_limit=message.time_limit_ms / 1000 if limited else None,
    )
    limits.check_stop(params, vocab_size)
    return params


def _speculation(message: generation_pb2.Speculation) -> SpeculationParams:
    known = message.mode in generation_pb2.Mode.values()
    limits.check(known, "speculation.mode", "AUTO or OFF", message.mode)
    known = message.acceptance in generation_pb2.Acceptance.values()
    limits.check(known, "speculation.acceptance", "EXACT or TYPICAL", message.acceptance)
    num_nodes = message.max_nodes if message.HasField("max_nodes") else None
    limits.check_max_nodes(num_nodes)
    off = message.mode == generation_pb2.OFF or num_nodes == 0
    return SpeculationParams(
        enabled=not off, max_nodes=num_nodes or None, typical=_typical(message)
    )


def _typical(message: generation_pb2.Speculation) -> TypicalAcceptance | None:
    is_typical, given = message.acceptance == generation_pb2.TYPICAL, {}
    for name in ("epsilon", "delta"):
        field = f"typical_{name}"
        if message.HasField(field):
            rule = "unset unless speculation.acceptance is TYPICAL"
            limits.check(is_typical, f"speculation.{field}", rule)
            given[name] = getattr(message, field)
    if not is_typical:
        return None
    typical = TypicalAcceptance(**given)
    limits.check_typical(typical)
    return typical


def _response_format(message: generation_pb2.ResponseFormat) -> JsonSchema | Regex | None:
    match message.WhichOneof("format"):
        case "json_schema":
            wanted: JsonSchema | Regex = JsonSchema(message.json_schema)
        case "regex":
            wanted = Regex(message.regex)
        case _:
            return None
    limits.check_format(wanted)
    return wanted


def in_pieces(events: Sequence[RowEvent]) -> Iterator[Sequence[RowEvent]]:
    """Runs of events whose parts are made at once: none lists much more than MOST_LISTED tokens."""
    start = listed = 0
    for end, event in enumerate(events, start=1):
        tokens: tuple[GeneratedToken | PromptToken, ...] = (*event.prompt_tokens, *event.tokens)
        listed += len(tokens) + sum(len(each.logprobs.top) for each in tokens if each.logprobs)
        if listed >= MOST_LISTED or end == len(events):
            yield events[start:end]
            start, listed = end, 0


def stream_part(
    events: Sequence[RowEvent], tokenizer: Tokenizer
) -> generation_pb2.GenerateStreamResponse:
    """The text and tokens of some events of one row."""
    prompt = [token for event in events for token in event.prompt_tokens]
    tokens = [token for event in events for token in event.tokens]
    return generation_pb2.GenerateStreamResponse(
        text="".join(event.text for event in events),
        token_ids=[token.id for token in tokens],
        tokens=[_token(token, tokenizer) for token in tokens],
        prompt_tokens=[_token(token, tokenizer) for token in prompt],
    )


def joined(
    parts: Sequence[generation_pb2.GenerateStreamResponse], final: generation_pb2.GenerateResponse
) -> generation_pb2.GenerateResponse:
    """The unary reply: a stream's parts put into its closing message."""
    final.text = "".join(part.text for part in parts)
    for part in parts:
        final.token_ids.extend(part.token_ids)
        final.tokens.extend(part.tokens)
        final.prompt_tokens.extend(part.prompt_tokens)
    return final


def final_response(final: Final, prepared: Prepared) -> generation_pb2.GenerateResponse:
    """The closing message of a row, without text and tokens."""
    request, stats, timings = prepared.request, final.speculation, final.timings
    return generation_pb2.GenerateResponse(
        finish_reason=_FINISH_REASONS[final.finish_reason],
        stop_match=final.stop_match,
        seed=request.sampling.seed,
        request_id=request.request_id,
        usage=generation_pb2.Usage(
            prompt_tokens=final.prompt_tokens,
            cached_prompt_tokens=final.cached_prompt_tokens,
            generated_tokens=final.generated_tokens,
        ),
        speculation=_speculation_stats(stats),
        adapters=_adapters_used(request),
        timings=generation_pb2.Timings(
            queue_ms=timings.queue * 1000,
            adapter_wait_ms=timings.adapter_wait * 1000,
            time_to_first_token_ms=timings.time_to_first_token * 1000,
            total_ms=timings.total * 1000,
        ),
        prompt=prepared.prompt,
    )


def _speculation_stats(stats: SpeculationStats) -> generation_pb2.SpeculationStats:
    return generation_pb2.SpeculationStats(
        steps=stats.steps,
        drafted_tokens=stats.drafted.total(),
        accepted_tokens=stats.accepted.total(),
        accepted_by_head=stats.accepted_by_head,
        by_source=[
            generation_pb2.SourceStats(
                source=_SOURCES[source],
                drafted_tokens=count,
                accepted_tokens=stats.accepted[source],
            )
            for source, count in stats.drafted.items()
        ],
    )


def _adapters_used(request: Request) -> generation_pb2.AdaptersUsed:
    heads = request.heads
    return generation_pb2.AdaptersUsed(
        loras=[
            generation_pb2.LoraUsed(lora_id=use.lora_id, digest=use.digest, scale=use.scale)
            for use in request.loras
        ],
        medusa_id=heads.medusa_id if heads else "",
        medusa_digest=heads.digest if heads else "",
        shared_medusa_id=heads.shared_id if heads else "",
        shared_medusa_digest=heads.shared_digest if heads else "",
    )


def _token(token: GeneratedToken | PromptToken, tokenizer: Tokenizer) -> generation_pb2.Token:
    message = generation_pb2.Token(
        id=token.id,
        text=tokenizer.token_text(token.id),
        special=tokenizer.is_special(token.id),
        source=_SOURCES[token.source] if isinstance(token, GeneratedToken) else None,
    )
    if token.logprobs is not None:
        message.logprob = token.logprobs.logprob
        for token_id, logprob in token.logprobs.top:
            message.top.add(id=token_id, text=tokenizer.token_text(token_id), logprob=logprob)
    return message
