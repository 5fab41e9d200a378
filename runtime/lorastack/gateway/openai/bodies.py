"""The bodies of OpenAI's generating calls, with vLLM's and our own fields.

A field that is not declared is refused by name, and so is a declared one that nothing here obeys.
Fields that change no token (`_Harmless`) are taken and forgotten.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lorastack.request import MAX_LORAS

MAX_CHOICES = 16  # n
MAX_PROMPTS = 64  # rows of one body: prompts times n
MAX_IDS = 1 << 18
MAX_MESSAGES = 1024
MAX_TOOLS = 256
MAX_TOP_LOGPROBS = 20


def _refuse(value: object) -> None:
    if value is not None:
        raise ValueError("not supported here; leave it out")


Refused: TypeAlias = Annotated[None, BeforeValidator(_refuse)]  # null passes
Uint32: TypeAlias = Annotated[int, Field(ge=0, le=2**32 - 1)]
Ids: TypeAlias = Annotated[list[Uint32], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=4096)]


class Strict(BaseModel):
    """A JSON object without unknown keys."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class LoraScale(Strict):
    """One LoRA of a stack."""

    lora_id: Name
    scale: float = 1.0


class LlamaLora(Strict):
    """llama.cpp's way to name one. id: the adapter's, a string."""

    id: Name
    scale: float = 1.0


class SpeculationOptions(Strict):
    """As `Speculation` of the gRPC API."""

    mode: Literal["auto", "off"] = "auto"
    acceptance: Literal["exact", "typical"] = "exact"
    max_nodes: Uint32 | None = None
    typical_epsilon: float | None = None
    typical_delta: float | None = None


class StreamOptions(Strict):
    """include_usage: one more chunk at the end tells the tokens used."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class NamedSchema(Strict):
    """OpenAI's `json_schema`. The output follows the schema, strict or not."""

    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormatOptions(Strict):
    """OpenAI's forms; `schema` beside json_object is LoRAX's, json and regex with `value` TGI's."""

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: NamedSchema | None = None
    of_object: dict[str, Any] | None = Field(None, alias="schema")
    value: dict[str, Any] | str | None = None


class StructuredOutputs(Strict):
    """vLLM's, as far as it maps on response_format."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Refused = None
    grammar: Refused = None
    structural_tag: Refused = None
    disable_any_whitespace: Refused = None
    whitespace_pattern: Refused = None


class _Harmless(Strict):
    """What does not change the output."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    use_beam_search: Literal[False] | None = None
    include_stop_str_in_output: Literal[False] | None = None
    skip_special_tokens: Literal[True] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    length_penalty: Literal[1] | None = None
    min_tokens: Literal[0] | None = None
    priority: Literal[0] | None = None
    truncate_prompt_tokens: Refused = None
    prompt_logprobs: Refused = None
    guided_choice: Refused = None
    guided_grammar: Refused = None
    guided_decoding_backend: str | None = None
    guided_whitespace_pattern: Refused = None
    allowed_token_ids: Refused = None
    bad_words: Refused = None


class GenerationBody(_Harmless):
    """What both generating calls take. model: the base model, a LoRA, heads, a bundle or an alias.

    loras (or llama.cpp's lora), with the base as model: a stack. medusa_id: as in GenerateRequest.
    seed: choice i of a prompt is drawn with seed + i; a negative one counts from 2**64 down.
    """

    model: Name
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Uint32 | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None
    stop_token_ids: Annotated[list[Uint32], Field(fail_fast=True, max_length=1024)] | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**32 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[Uint32, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    response_format: ResponseFormatOptions | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    structured_outputs: StructuredOutputs | None = None
    medusa_id: str | None = None
    loras: Annotated[list[LoraScale], Field(fail_fast=True, max_length=MAX_LORAS)] | None = None
    lora: Annotated[list[LlamaLora], Field(fail_fast=True, max_length=MAX_LORAS)] | None = None
    speculation: Literal["auto", "off"] | SpeculationOptions | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions. max_tokens: 16 unless given; 0 with echo gives the prompt alone."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Refused = None
    add_special_tokens: Literal[True] | None = None


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """arguments: a JSON object as text."""

    name: str
    arguments: str


class MadeCall(Strict):
    """A call that an earlier reply made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    """One message. A content of several parts is joined by newlines."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True, max_length=256)] | None = None
    refusal: Refused = None
    audio: Refused = None
    function_call: Refused = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None


class Function(Strict):
    """What a model may call. parameters: a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function, the one kind of tool that there is here."""

    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """Of a tool."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(GenerationBody):
    """POST /v1/chat/completions. max_completion_tokens is max_tokens by its newer name."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Uint32 | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None
    add_special_tokens: Literal[False] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    audio: Refused = None
    prediction: Refused = None
    functions: Refused = None
    function_call: Refused = None
    reasoning_effort: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None
    moderation: Refused = None
    chat_template: Refused = None
    documents: Refused = None
