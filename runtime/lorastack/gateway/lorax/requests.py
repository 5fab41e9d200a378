"""From LoRAX's and TGI's parameters to a request of ours and the adapters it runs with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lorastack.client import (
    ChatMessage,
    ChatMessages,
    GenerateRequest,
    MajoritySign,
    OutputParams,
    ResponseFormat,
    SamplingParams,
    Speculation,
    StopParams,
    Strategy,
)
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.lorax.bodies import Body, Grammar, MergedAdapters, Parameters
from lorastack.gateway.selection import Selection


def request_of(body: Body, *, streams: bool) -> GenerateRequest:
    """The request, still without adapters. Raises InvalidArgumentError naming the parameter."""
    given = body.parameters or Parameters()
    _refuse_what_we_lack(given)
    request = GenerateRequest(
        sampling=_sampling(given),
        stop=StopParams(
            max_new_tokens=given.max_new_tokens,
            stop_sequences=given.stop or (),
            ignore_eos=bool(given.ignore_eos_token),
        ),
        output=_output(given, streams=streams),
        response_format=_response_format(given),
        speculation=_speculation(given),
    )
    if given.apply_chat_template:
        _refuse(given.truncate is not None, "truncate", "leave it out beside apply_chat_template")
        request.chat.CopyFrom(
            ChatMessages(messages=[ChatMessage(role="user", content=body.inputs)])
        )
    else:
        request.prompt = body.inputs
    return request


def selection_of(given: Parameters) -> Selection:
    """Which adapters, and whether the server may fetch them.

    A source that is not told is the hub, as LoRAX has it: what the store lacks is pulled.
    Strategies other than linear are merged first: see `merge_of`.
    """
    ways = ("adapter_id", "merged_adapters", "lora_id", "loras")
    chosen = [way for way in ways if getattr(given, way)]
    _refuse(len(chosen) > 1, " and ".join(chosen), "name adapters in one way only")
    source = given.adapter_source or "hub"
    _refuse(
        source not in ("hub", "local"),
        "adapter_source",
        f"{source!r} is not served here; use 'hub', or 'local' for an id of the server's store",
    )
    stack: list[tuple[str, float]] = []
    if given.merged_adapters:
        stack = _weighted(given.merged_adapters)
    elif given.lora_id:
        stack = [(given.lora_id, 1.0)]
    for lora in given.loras or ():
        stack.append((lora.lora_id, 1.0 if lora.scale is None else lora.scale))
    return Selection(
        name=given.adapter_id or "",
        loras=stack,
        medusa_id=given.medusa_id or "",
        pull=source == "hub",
        token=given.api_token or "",
    )


@dataclass(frozen=True, slots=True)
class Merge:
    """How a merge is made that is not a weighted sum."""

    strategy: Strategy
    density: float
    majority_sign: MajoritySign


def merge_of(given: Parameters) -> Merge | None:
    """None: nothing to merge, or a weighted sum, which is a stack."""
    merged = given.merged_adapters
    if merged is None or merged.merge_strategy is None or merged.merge_strategy == "linear":
        return None
    return Merge(
        strategy=merged.merge_strategy,
        density=merged.density or 0.0,
        majority_sign=merged.majority_sign_method or "total",
    )


def is_sampled(given: Parameters) -> bool:
    """LoRAX's and TGI's rule: any parameter that shapes the distribution samples, 0 never does."""
    shaped = (
        given.temperature not in (None, 1.0)
        or given.top_k is not None
        or (given.top_p or 1.0) < 1.0
        or (given.typical_p or 1.0) < 1.0
    )
    return (bool(given.do_sample) or shaped) and given.temperature != 0


def wants_details(given: Parameters) -> bool:
    """decoder_input_details asks for details too, as in LoRAX."""
    return bool(given.details or given.decoder_input_details)


def _refuse(condition: bool, field: str, why: str) -> None:
    if condition:
        raise InvalidArgumentError(f"parameters.{field}: {why}", field=f"parameters.{field}")


def _refuse_what_we_lack(given: Parameters) -> None:
    _refuse(bool(given.watermark), "watermark", "not served here; leave it out")
    _refuse((given.best_of or 1) > 1, "best_of", "not served here beyond 1; send more requests")


def _weighted(merged: MergedAdapters) -> list[tuple[str, float]]:
    mistaken = len(merged.ids) != len(merged.weights)
    _refuse(mistaken, "merged_adapters.weights", "must be as many as ids")
    return list(zip(merged.ids, merged.weights, strict=True))


def _sampling(given: Parameters) -> SamplingParams:
    sampling = SamplingParams(
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=given.seed,
    )
    if is_sampled(given):
        sampling.temperature = 1.0 if given.temperature is None else given.temperature
        for name in ("top_k", "top_p", "typical_p"):
            if (value := getattr(given, name)) is not None:
                setattr(sampling, name, value)
    return sampling


def _output(given: Parameters, *, streams: bool) -> OutputParams:
    alternatives = given.return_k_alternatives or 0
    top = given.top_n_tokens or 0
    prefill = bool(given.decoder_input_details)
    _refuse(streams and prefill, "decoder_input_details", "not served in streams; leave it out")
    logprobs = streams or wants_details(given)
    _refuse(
        not logprobs and max(alternatives, top) > 0,
        "return_k_alternatives" if alternatives else "top_n_tokens",
        "the alternatives are in the details; set details too",
    )
    return OutputParams(
        logprobs=logprobs,
        top_logprobs=max(alternatives, top),
        prompt_logprobs=prefill,
    )


def _response_format(given: Parameters) -> ResponseFormat | None:
    wanted = given.response_format
    if wanted is not None and wanted.type == "text":
        _refuse(wanted.json_schema is not None, "response_format.schema", "not with type text")
        wanted = None
    _refuse(wanted is not None and given.grammar is not None, "grammar", "not with response_format")
    if wanted is not None:
        return ResponseFormat(json_schema=json.dumps(wanted.json_schema or {"type": "object"}))
    return None if given.grammar is None else _grammar(given.grammar)


def _grammar(grammar: Grammar) -> ResponseFormat:
    value: Any = grammar.value
    if grammar.type == "regex":
        _refuse(not isinstance(value, str), "grammar.value", "a regex is a string")
        return ResponseFormat(regex=value)
    if grammar.type == "json_schema" and isinstance(value, dict):
        _refuse(not value.keys() <= {"name", "schema"}, "grammar.value", "has name and schema only")
        value = value.get("schema")
    _refuse(not isinstance(value, str | dict), "grammar.value", "must hold a JSON schema")
    return ResponseFormat(json_schema=value if isinstance(value, str) else json.dumps(value))


def _speculation(given: Parameters) -> Speculation | None:
    wanted = given.speculation
    if wanted is None:
        return None
    return Speculation(
        mode=(wanted.mode or "auto").upper(),
        acceptance=(wanted.acceptance or "exact").upper(),
        max_nodes=wanted.max_nodes,
        typical_epsilon=wanted.typical_epsilon,
        typical_delta=wanted.typical_delta,
    )
