"""What LoRAX's and TGI's clients send and read. One model serves both: unset fields come as null.

A field that is not here is refused by name: it might have changed the output.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorastack.request import MAX_LORAS

MAX_COUNT = 2**31 - 1

Name = Annotated[str, Field(min_length=1, max_length=400)]
Count = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Share = Annotated[float, Field(gt=0, le=1)]


class Model(BaseModel):
    """JSON of the very types that are named, and no other fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class MergedAdapters(Model):
    """LoRAX's merge. linear is the weighted sum of the adapters, exactly, without a merge."""

    ids: Annotated[list[Name], Field(min_length=1, max_length=MAX_LORAS)]
    weights: Annotated[list[float], Field(min_length=1, max_length=MAX_LORAS)]
    merge_strategy: Literal["linear", "ties", "dare_linear", "dare_ties"] | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = None
    majority_sign_method: Literal["total", "frequency"] | None = None


class ResponseFormat(Model):
    """LoRAX's. Without a schema: any JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class Grammar(Model):
    """TGI's. json: the schema or its text; json_schema: {"schema": ...}; regex: its text."""

    type: Literal["json", "json_schema", "regex"]
    value: str | dict[str, Any]


class Lora(Model):
    """One LoRA of a stack."""

    lora_id: Name
    scale: float | None = None


class Speculation(Model):
    """As in lorastack.v1: none of it changes the tokens but acceptance "typical"."""

    mode: Literal["auto", "off"] | None = None
    acceptance: Literal["exact", "typical"] | None = None
    max_nodes: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    typical_epsilon: float | None = None
    typical_delta: float | None = None


class Parameters(Model):
    """The parameters of LoRAX and TGI, and lora_id, medusa_id, loras and speculation of ours."""

    adapter_id: str | None = Field(default=None, max_length=400)
    adapter_source: Annotated[str, Field(max_length=100)] | None = None
    api_token: Annotated[str, Field(max_length=1000)] | None = None
    merged_adapters: MergedAdapters | None = None
    lora_id: Name | None = None
    medusa_id: Name | None = None
    loras: Annotated[list[Lora], Field(max_length=MAX_LORAS)] | None = None
    speculation: Speculation | None = None

    do_sample: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Count | None = None
    top_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    best_of: Count | None = None
    watermark: bool | None = None

    max_new_tokens: Count | None = None
    stop: list[str] | None = None
    ignore_eos_token: bool | None = None
    truncate: Count | None = None
    response_format: ResponseFormat | None = None
    grammar: Grammar | None = None
    apply_chat_template: bool | None = None

    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: Count | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None


class Body(Model):
    """A request of / and /generate and /generate_stream; stream counts on / alone."""

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None
    stream: bool | None = None


class TokenizeBody(Model):
    """A request of /tokenize."""

    inputs: Annotated[str, Field(min_length=1)]
    add_special_tokens: bool | None = None


class PrefillToken(BaseModel):
    """A token of the prompt; the first has no logprob."""

    id: int
    text: str
    logprob: float | None


class Alternative(BaseModel):
    """A likely token beside one that was chosen."""

    id: int
    text: str
    logprob: float


class Token(BaseModel):
    """A token of the output. skipped: it was drafted, so the model took no step of its own."""

    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool
    alternative_tokens: list[Alternative] | None = None


class Details(BaseModel):
    """What came of a request. seed: of sampled ones."""

    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | None = None


class Generated(BaseModel):
    """The reply of /generate; / answers a list of one."""

    generated_text: str
    details: Details | None = None


class Info(BaseModel):
    """The reply of /info: what LoRAX and TGI tell of themselves."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_input_tokens: int
    max_total_tokens: int
    version: str
    sha: str | None
    docker_label: str | None
