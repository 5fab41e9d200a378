"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from lorastack.client import GenerateRequest, GenerateResponse, GenerateStreamResponse
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.exchange import Call, Events, Operation, Reply
from lorastack.gateway.openai.bodies import MAX_PROMPTS, CompletionBody
from lorastack.gateway.openai.convert import Wanted, check_logprobs, choices, wanted
from lorastack.gateway.openai.refusals import failed, refuse
from lorastack.gateway.openai.replies import (
    TEXT,
    Chunks,
    Head,
    Report,
    Usage,
    completion_logprobs,
    finish_reason,
    head,
    no_usage,
    report,
    usage,
)
from lorastack.gateway.openai.rows import Rows, generate_rows, open_rows
from lorastack.gateway.openai.streaming import chunks, wants_usage
from lorastack.gateway.selection import Selector
from lorastack.gateway.upstream import Upstream, row_id

DEFAULT_MAX_TOKENS = 16  # as OpenAI's


class CompletionLogprobs(BaseModel):
    """One entry a token."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """stop_reason: the stop sequence that ended the text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str
    stop_reason: str | None = None


class CompletionReply(BaseModel):
    """Every prompt's choices, one prompt after the other."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage
    lorastack: Report


@dataclass(frozen=True, slots=True)
class _Ask:
    """A body and what was made of it. echoes: what stands before each row's text."""

    body: CompletionBody
    wanted: Wanted
    rows: list[GenerateRequest]
    echoes: list[str]

    @property
    def prompt_only(self) -> bool:
        return self.body.max_tokens == 0


def operations(upstream: Upstream, selector: Selector) -> list[Operation[Any]]:
    """The one route."""

    async def complete(call: Call, body: CompletionBody) -> Reply | Events:
        ask = await _ask(call, body, upstream)
        top = head("cmpl", "text_completion", body.model, ask.wanted)
        if body.stream:
            rows = await open_rows(selector, ask.wanted.selection, ask.rows)
            return Events(_events(ask, top, rows), failed, rows.close)
        finals = await generate_rows(selector, ask.wanted.selection, ask.rows)
        # In a thread: with log-probabilities of thousands of tokens it takes a while.
        return Reply(await asyncio.to_thread(_whole, ask, top, finals))

    return [
        Operation(
            method="POST",
            path="/v1/completions",
            summary="Text behind one or several prompts",
            handle=complete,
            refuse=refuse,
            body=CompletionBody,
            reply=CompletionReply,
            streams=True,
        )
    ]


async def _ask(call: Call, body: CompletionBody, upstream: Upstream) -> _Ask:
    num_choices, prompts = body.n or 1, _prompts(body.prompt)
    if body.best_of not in (None, 1, num_choices):
        raise InvalidArgumentError("best_of is not supported; leave it out", field="best_of")
    if len(prompts) * num_choices > MAX_PROMPTS:
        raise InvalidArgumentError(
            f"{len(prompts)} prompts with n {num_choices} are more than {MAX_PROMPTS} rows; send "
            "fewer",
            field="prompt",
        )
    if body.max_tokens == 0 and not body.echo:
        raise InvalidArgumentError("max_tokens must be at least 1 without echo", field="max_tokens")
    if body.echo and body.stream and not isinstance(prompts[0], str):
        raise InvalidArgumentError(
            "echo of token ids is not there with stream; leave one of both out", field="echo"
        )
    what = await wanted(body, upstream)
    base = what.request
    limit = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    base.stop.max_new_tokens = max(limit, 1)  # 0: the one token is left out of the reply
    if body.logprobs is not None:
        base.output.logprobs = True
        base.output.top_logprobs = body.logprobs
        base.output.prompt_logprobs = bool(body.echo)
        if not body.stream:
            # No text has more tokens than bytes.
            lengths = [_length(prompt) if body.echo else 0 for prompt in prompts]
            num_tokens = num_choices * sum(min(each, what.max_context) + limit for each in lengths)
            check_logprobs(num_tokens, body.logprobs)
    rows, echoes = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            base.prompt = prompt
        else:
            base.token_ids.ids[:] = prompt
            base.output.return_prompt = bool(body.echo)
        rows += choices(what, base, [row_id(call.request_id) for _ in range(num_choices)])
        echoes += [prompt if body.echo and isinstance(prompt, str) else ""] * num_choices
    return _Ask(body, what, rows, echoes)


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [given]
    return given


def _length(prompt: str | list[int]) -> int:
    return len(prompt.encode()) if isinstance(prompt, str) else len(prompt)


def _whole(ask: _Ask, top: Head, finals: Sequence[GenerateResponse]) -> CompletionReply:
    _drop_output(ask, finals)
    made = []
    for index, (final, echo) in enumerate(zip(finals, ask.echoes, strict=True)):
        logprobs = None
        if ask.body.logprobs is not None:
            logprobs = completion_logprobs([*final.prompt_tokens, *final.tokens], 0)
        made.append(
            CompletionChoice(
                index=index,
                text=(final.prompt or echo) + final.text,
                logprobs=None if logprobs is None else CompletionLogprobs(**logprobs),
                finish_reason=finish_reason(final),
                stop_reason=final.stop_match or None,
            )
        )
    return CompletionReply(
        **top.fields(),
        choices=made,
        usage=usage(finals, ask.wanted.num_choices),
        lorastack=report(finals),
    )


def _drop_output(ask: _Ask, finals: Sequence[GenerateResponse]) -> None:
    """Of a body that wants the prompt alone."""
    if ask.prompt_only:
        for final in finals:
            final.ClearField("text")
            final.ClearField("tokens")
            final.usage.generated_tokens = 0
            final.finish_reason = GenerateResponse.LENGTH


def _events(ask: _Ask, top: Head, rows: Rows) -> AsyncGenerator[bytes]:
    with_usage = wants_usage(ask.body)
    streams = [_Row(ask, top, index, with_usage) for index in range(len(ask.rows))]
    return chunks(top, rows, streams, ask.wanted.num_choices, with_usage)


class _Row:
    """One row's chunks."""

    def __init__(self, ask: _Ask, top: Head, index: int, with_usage: bool) -> None:
        self._ask = ask
        self._top = top
        self._index = index
        self._usage = no_usage(with_usage)
        self._echo = ask.echoes[index]
        self._with_logprobs = ask.body.logprobs is not None
        self._offset = 0
        self._plain = Chunks(top, self._choice(TEXT), with_usage)

    def chunk(self, part: GenerateStreamResponse) -> bytes:
        """b"": there is nothing to say."""
        text, told = part.text, [*part.prompt_tokens, *part.tokens]
        if self._ask.prompt_only:
            text, told = "", [*part.prompt_tokens]
        if self._echo:
            text, self._echo = self._echo + text, ""
        if not self._with_logprobs:
            return self._plain.chunk(text) if text else b""
        if not text and not told:
            return b""
        logprobs = completion_logprobs(told, self._offset)
        self._offset += sum(len(token.text) for token in told)
        return self._top.chunk([self._choice(text, logprobs)], **self._usage)

    def end(self, final: GenerateResponse) -> bytes:
        """Why the row ended."""
        _drop_output(self._ask, [final])
        choice = {
            **self._choice(self._echo),
            "finish_reason": finish_reason(final),
            "stop_reason": final.stop_match or None,
        }
        return self._top.chunk([choice], **self._usage, lorastack=report([final]).model_dump())

    def _choice(self, text: str, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": None}
