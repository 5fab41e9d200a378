"""A call after its checks: valid fields in our own types, ids and text still as given."""

from __future__ import annotations

from dataclasses import dataclass

from lorastack.request import SamplingParams, SpeculationParams, StopParams
from lorastack.text.grammar import JsonSchema, Regex


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt as plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class Ids:
    """A prompt as token ids, run as they are."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for a chat template: (role, content) pairs, and JSON as the caller wrote it.

    fields: what else each message has, an object or "" for each; () if none has any.
    """

    messages: tuple[tuple[str, str], ...]
    fields: tuple[str, ...] = ()
    tools: str = ""
    variables: str = ""

    @property
    def is_plain(self) -> bool:
        """True for roles and contents alone."""
        return not (self.fields or self.tools or self.variables)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, rendered by an adapter's own chat template."""

    text: str


Given = Text | Ids | Chat | Rendered


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """A GenerateRequest whose fields are each valid; made by `service.calls.convert`."""

    request_id: str
    input: Given
    loras: tuple[tuple[str, float], ...]  # (id, scale)
    medusa_id: str
    sampling: SamplingParams
    seeded: bool  # False: the server draws the seed
    max_new_tokens: int | None  # None: up to the context limit
    stop: StopParams  # its max_new_tokens is set later
    speculation: SpeculationParams
    num_logprobs: int | None
    return_prompt: bool
    num_prompt_logprobs: int | None = None
    response_format: JsonSchema | Regex | None = None
