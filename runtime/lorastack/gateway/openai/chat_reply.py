"""The body of a chat's whole reply."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lorastack.gateway.openai.replies import Report, Usage


class CalledFunction(BaseModel):
    """arguments: a JSON object as text."""

    name: str
    arguments: str


class MadeCall(BaseModel):
    """A call that the model wants made."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ReplyMessage(BaseModel):
    """content: null where there are calls and nothing else."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[MadeCall] | None = None


class TokenEntry(BaseModel):
    """bytes: null where the token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TokenEntry):
    """With the most likely tokens in its place."""

    top_logprobs: list[TokenEntry]


class ChatLogprobs(BaseModel):
    """One entry a token."""

    content: list[TokenLogprobs]
    refusal: None = None


class ChatChoice(BaseModel):
    """stop_reason: the stop sequence that ended the text."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str
    stop_reason: str | None = None


class ChatReply(BaseModel):
    """One choice a row."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    lorastack: Report
