"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from lorastack.client import GenerateRequest, GenerateResponse, GenerateStreamResponse
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.exchange import Call, Events, Operation, Reply
from lorastack.gateway.openai.bodies import ChatBody
from lorastack.gateway.openai.chat_reply import ChatChoice, ChatReply
from lorastack.gateway.openai.conversation import ToolUse, chat_messages, tool_use
from lorastack.gateway.openai.convert import Wanted, check_logprobs, choices, wanted
from lorastack.gateway.openai.refusals import failed, refuse
from lorastack.gateway.openai.replies import (
    TEXT,
    Chunks,
    Head,
    chat_logprobs,
    finish_reason,
    head,
    no_usage,
    report,
    usage,
)
from lorastack.gateway.openai.rows import Rows, generate_rows, open_rows
from lorastack.gateway.openai.streaming import chunks, wants_usage
from lorastack.gateway.openai.tools import ToolCall, ToolParser, parse_forced
from lorastack.gateway.selection import Selector
from lorastack.gateway.upstream import Upstream, row_id


@dataclass(frozen=True, slots=True)
class _Ask:
    """A body and what was made of it."""

    body: ChatBody
    wanted: Wanted
    use: ToolUse
    rows: list[GenerateRequest]

    @property
    def num_top(self) -> int:
        return self.body.top_logprobs or 0


def operations(upstream: Upstream, selector: Selector) -> list[Operation[Any]]:
    """The one route."""

    async def chat(call: Call, body: ChatBody) -> Reply | Events:
        ask = await _ask(call, body, upstream)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        top = head("chatcmpl", kind, body.model, ask.wanted)
        if body.stream:
            rows = await open_rows(selector, ask.wanted.selection, ask.rows)
            return Events(_events(ask, top, rows), failed, rows.close)
        finals = await generate_rows(selector, ask.wanted.selection, ask.rows)
        # In a thread: with log-probabilities of thousands of tokens it takes a while.
        return Reply(await asyncio.to_thread(_whole, ask, top, finals))

    return [
        Operation(
            method="POST",
            path="/v1/chat/completions",
            summary="The next message of a chat",
            handle=chat,
            refuse=refuse,
            body=ChatBody,
            reply=ChatReply,
            streams=True,
        )
    ]


async def _ask(call: Call, body: ChatBody, upstream: Upstream) -> _Ask:
    if body.top_logprobs and not body.logprobs:
        raise InvalidArgumentError("top_logprobs needs logprobs", field="top_logprobs")
    use = tool_use(body)
    chat = chat_messages(body)
    what = await wanted(body, upstream)
    base = what.request
    if use.schema:
        if base.HasField("response_format"):
            raise InvalidArgumentError(
                "a tool_choice that forces calls and a response_format exclude each other; leave "
                "one out",
                field="response_format",
            )
        base.response_format.json_schema = use.schema
    base.chat.CopyFrom(chat)
    limit = _max_tokens(body)
    if limit is not None:
        base.stop.max_new_tokens = limit
    base.output.logprobs = bool(body.logprobs)
    base.output.top_logprobs = body.top_logprobs or 0
    if body.logprobs and not body.stream:
        num_tokens = what.num_choices * (limit or what.max_context)
        check_logprobs(num_tokens, base.output.top_logprobs)
    row_ids = [row_id(call.request_id) for _ in range(what.num_choices)]
    return _Ask(body, what, use, choices(what, base, row_ids))


def _max_tokens(body: ChatBody) -> int | None:
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise InvalidArgumentError(
            "max_tokens and max_completion_tokens differ; send one", field="max_completion_tokens"
        )
    limit = older if newer is None else newer
    if limit == 0:
        raise InvalidArgumentError("max_tokens must be at least 1", field="max_tokens")
    return limit


class _Calls:
    """Takes one row's calls out of its text."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self._parser = ToolParser(use.names)
        self._forced: list[str] = []
        self.num_calls = 0

    def feed(self, part: GenerateStreamResponse | GenerateResponse) -> list[str | ToolCall]:
        """What a part of the reply gives. Forced calls come with the end, once they are sound."""
        if self._use.schema:
            self._forced.append(part.text)
            return []
        return self._kept(self._parser.feed(part.text, part.tokens))

    def finish(self) -> list[str | ToolCall]:
        """What was held back."""
        if not self._use.schema:
            return self._kept(self._parser.finish())
        text = "".join(self._forced)
        calls = self._kept([*parse_forced(text)])
        return calls or [text] * bool(text)  # calls that were cut short are text

    def finish_reason(self, final: GenerateResponse) -> str:
        """As OpenAI has it: a call of the one tool that was named is no reason of its own."""
        reason = finish_reason(final)
        calls = self.num_calls and not self._use.named
        return "tool_calls" if calls and reason == "stop" else reason

    def _kept(self, deltas: Sequence[str | ToolCall]) -> list[str | ToolCall]:
        """Without the calls beyond the first of whoever wants one."""
        kept: list[str | ToolCall] = []
        for delta in deltas:
            if isinstance(delta, ToolCall):
                self.num_calls += 1
                if self.num_calls > 1 and not self._use.parallel:
                    continue
            kept.append(delta)
        return kept


def _whole(ask: _Ask, top: Head, finals: Sequence[GenerateResponse]) -> ChatReply:
    made = []
    for index, final in enumerate(finals):
        content: str | None = final.text
        calls: list[dict[str, Any]] = []
        reason = finish_reason(final)
        if ask.use.names:
            taken = _Calls(ask.use)
            deltas = [*taken.feed(final), *taken.finish()]
            calls = [each.message() for each in deltas if isinstance(each, ToolCall)]
            content = "".join(each for each in deltas if isinstance(each, str))
            reason = taken.finish_reason(final)
        message = {"content": content or (None if calls else ""), "tool_calls": calls or None}
        logprobs = chat_logprobs(final.tokens, ask.num_top) if ask.body.logprobs else None
        made.append(
            ChatChoice.model_validate(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                    "stop_reason": final.stop_match or None,
                }
            )
        )
    return ChatReply(
        **top.fields(),
        choices=made,
        usage=usage(finals, ask.wanted.num_choices),
        lorastack=report(finals),
    )


async def _events(ask: _Ask, top: Head, rows: Rows) -> AsyncGenerator[bytes]:
    with_usage = wants_usage(ask.body)
    streams = [_Row(ask, top, index, with_usage) for index in range(len(ask.rows))]
    for stream in streams:
        yield stream.begin()
    async for chunk in chunks(top, rows, streams, ask.wanted.num_choices, with_usage):
        yield chunk


class _Row:
    """One row's chunks."""

    def __init__(self, ask: _Ask, top: Head, index: int, with_usage: bool) -> None:
        self._top = top
        self._index = index
        self._usage = no_usage(with_usage)
        self._with_logprobs = bool(ask.body.logprobs)
        self._num_top = ask.num_top
        self._calls = _Calls(ask.use) if ask.use.names else None
        self._plain = Chunks(top, self._choice({"content": TEXT}), with_usage)

    def begin(self) -> bytes:
        """The chunk that says who speaks."""
        return self._chunk({"role": "assistant", "content": ""})

    def chunk(self, part: GenerateStreamResponse) -> bytes:
        """b"": there is nothing to say."""
        text = part.text
        if self._calls is None and not self._with_logprobs:
            return self._plain.chunk(text) if text else b""
        logprobs = None
        if self._with_logprobs and part.tokens:
            logprobs = chat_logprobs(part.tokens, self._num_top)
        deltas: list[str | ToolCall] = [text] * bool(text)
        if self._calls is not None:
            deltas = self._calls.feed(part)
        return self._deltas(deltas, logprobs)

    def end(self, final: GenerateResponse) -> bytes:
        """What was held back, and why the row ended."""
        held, reason = b"", finish_reason(final)
        if self._calls is not None:
            held = self._deltas(self._calls.finish(), None)
            reason = self._calls.finish_reason(final)
        choice = {
            **self._choice({}),
            "finish_reason": reason,
            "stop_reason": final.stop_match or None,
        }
        told = report([final]).model_dump()
        return held + self._top.chunk([choice], **self._usage, lorastack=told)

    def _deltas(self, given: list[str | ToolCall], logprobs: dict[str, Any] | None) -> bytes:
        """A chunk each; the logprobs go with the first."""
        if not given and logprobs is not None:
            given = [""]
        made = b""
        for each in given:
            told = (
                {"tool_calls": [each.delta()]} if isinstance(each, ToolCall) else {"content": each}
            )
            made += self._chunk(told, logprobs)
            logprobs = None
        return made

    def _chunk(self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        return self._top.chunk([self._choice(delta, logprobs)], **self._usage)

    def _choice(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
