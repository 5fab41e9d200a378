"""From a body's fields to GenerateRequest: everything but the prompt and the tools."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lorastack.client import (
    OFF,
    GenerateRequest,
    ResponseFormat,
    SamplingParams,
    Speculation,
    StopParams,
)
from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.gateway.openai.bodies import (
    GenerationBody,
    ResponseFormatOptions,
    SpeculationOptions,
)
from lorastack.gateway.selection import Selection
from lorastack.gateway.upstream import Upstream

DEFAULT_TEMPERATURE = 1.0
MAX_LOGPROBS = 1 << 22  # in one reply that is not streamed
ANY_OBJECT = '{"type": "object"}'
# What TGI's clients send as model where the address is all that they know.
_PLACEHOLDERS = ("tgi", "dummy")
_SCALARS = (
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What every row of a body shares. request: without a prompt, an id and a seed of its own."""

    selection: Selection
    request: GenerateRequest
    num_choices: int
    fingerprint: str
    max_context: int


async def wanted(body: GenerationBody, upstream: Upstream) -> Wanted:
    """Raises InvalidArgumentError for fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise InvalidArgumentError(
            "stream_options needs stream; leave it out", field="stream_options"
        )
    info = await upstream.info()
    request = GenerateRequest(
        sampling=_sampling(body),
        stop=StopParams(
            stop_sequences=[body.stop] if isinstance(body.stop, str) else body.stop,
            stop_token_ids=body.stop_token_ids,
            ignore_eos=bool(body.ignore_eos),
        ),
        speculation=_speculation(body.speculation),
        response_format=_response_format(body),
    )
    selection = await _selection(body, info.base_model, upstream)
    return Wanted(selection, request, body.n or 1, info.fingerprint, info.limits.max_context)


def check_logprobs(num_tokens: int, num_top: int) -> None:
    """Refuses a reply that holds too much at once. num_tokens: of all rows, at most."""
    if num_tokens * (1 + num_top) > MAX_LOGPROBS:
        raise InvalidArgumentError(
            f"{num_tokens} tokens with {1 + num_top} log-probabilities each may come to more than "
            f"{MAX_LOGPROBS}; set a lower max_tokens, n or number of log-probabilities, or stream",
            field="logprobs",
        )


def choices(wanted: Wanted, base: GenerateRequest, row_ids: list[str]) -> list[GenerateRequest]:
    """The rows of one prompt: `base`, with their ids, and seeds that count from the given one."""
    rows = []
    for index, row_id in enumerate(row_ids):
        row = GenerateRequest()
        row.CopyFrom(base)
        row.request_id = row_id
        if base.sampling.HasField("seed"):
            row.sampling.seed = (base.sampling.seed + index) % 2**64
        rows.append(row)
    return rows


async def _selection(body: GenerationBody, base_model: str, upstream: Upstream) -> Selection:
    stack = [(each.lora_id, each.scale) for each in body.loras or ()]
    if body.lora:
        if stack:
            raise InvalidArgumentError("loras and lora say the same; send one", field="lora")
        stack = [(each.id, each.scale) for each in body.lora]
    name = "" if body.model == base_model else body.model
    if name in _PLACEHOLDERS and not await _is_adapter(name, upstream):
        name = ""
    if name and stack:
        raise InvalidArgumentError(
            f"loras is a stack of its own: name the base model, {base_model!r}, as model, and put "
            f"{name[:200]!r} into loras",
            field="loras",
        )
    return Selection(name=name, loras=stack, medusa_id=body.medusa_id or "")


async def _is_adapter(name: str, upstream: Upstream) -> bool:
    try:
        await upstream.client.get_adapter(name)
    except NotFoundError:
        return False
    return True


def _sampling(body: GenerationBody) -> SamplingParams:
    temperature = DEFAULT_TEMPERATURE if body.temperature is None else body.temperature
    given = {name: getattr(body, name) for name in _SCALARS}
    return SamplingParams(
        temperature=temperature,
        top_k=body.top_k if body.top_k and body.top_k > 0 else None,
        logit_bias=body.logit_bias,
        seed=None if body.seed is None else body.seed % 2**64,
        **{name: value for name, value in given.items() if value is not None},
    )


def _speculation(given: str | SpeculationOptions | None) -> Speculation | None:
    if given is None:
        return None
    options = SpeculationOptions(mode=given) if isinstance(given, str) else given  # type: ignore[arg-type]
    return Speculation(
        mode=OFF if options.mode == "off" else None,
        acceptance="TYPICAL" if options.acceptance == "typical" else None,
        max_nodes=options.max_nodes,
        typical_epsilon=options.typical_epsilon,
        typical_delta=options.typical_delta,
    )


def _response_format(body: GenerationBody) -> ResponseFormat | None:
    """The one form that is asked for, by whatever name."""
    asked: dict[str, ResponseFormat] = {}
    if body.response_format is not None and body.response_format.type != "text":
        asked["response_format"] = _format(body.response_format)
    if body.guided_json is not None:
        asked["guided_json"] = ResponseFormat(json_schema=_schema(body.guided_json))
    if body.guided_regex is not None:
        asked["guided_regex"] = ResponseFormat(regex=body.guided_regex)
    if (given := body.structured_outputs) is not None:
        if given.json_ is not None:
            asked["structured_outputs.json"] = ResponseFormat(json_schema=_schema(given.json_))
        if given.json_object:
            asked["structured_outputs.json_object"] = ResponseFormat(json_schema=ANY_OBJECT)
        if given.regex is not None:
            asked["structured_outputs.regex"] = ResponseFormat(regex=given.regex)
    if len(asked) > 1:
        names = " and ".join(asked)
        raise InvalidArgumentError(
            f"{names} each say what the output looks like; send one", field="response_format"
        )
    return next(iter(asked.values()), None)


def _format(given: ResponseFormatOptions) -> ResponseFormat:
    present = {"json_schema": given.json_schema, "schema": given.of_object, "value": given.value}
    own = {"json_schema": "json_schema", "json_object": "schema", "json": "value", "regex": "value"}
    wanted = own[given.type]
    for name, value in present.items():
        if value is not None and name != wanted:
            raise InvalidArgumentError(
                f"response_format.{name} does not go with type {given.type!r}; leave it out",
                field="response_format",
            )
    content: Any = present[wanted]
    if given.type == "json_object" and content is None:
        return ResponseFormat(json_schema=ANY_OBJECT)
    if content is None:
        raise InvalidArgumentError(
            f"response_format of type {given.type!r} needs {wanted}", field="response_format"
        )
    if given.json_schema is not None:
        schema = given.json_schema.json_schema
        return ResponseFormat(json_schema=ANY_OBJECT if schema is None else json.dumps(schema))
    if given.type == "regex":
        if not isinstance(content, str):
            raise InvalidArgumentError(
                "response_format.value must be a regular expression", field="response_format"
            )
        return ResponseFormat(regex=content)
    return ResponseFormat(json_schema=_schema(content))


def _schema(given: dict[str, Any] | str) -> str:
    return given if isinstance(given, str) else json.dumps(given)
