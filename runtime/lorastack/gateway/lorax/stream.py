"""A reply of LoRAX and TGI as it is made: one server-sent event a token.

Their last event has the last token, the whole text and the details; a stream of ours tells that it
has ended one message later. A token waits for that message only where it may be the last.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator

from lorastack.client import GenerateResponse, GenerateStreamResponse, Token
from lorastack.errors import InternalError, Reason
from lorastack.gateway.lorax.bodies import Body, Parameters
from lorastack.gateway.lorax.replies import finish_reason, is_skipped, seed_of, shown

MOST_ADDED = 16  # special tokens that a tokenizer puts around a prompt

_BOOLS = ("false", "true")
_NOT_SPECIAL = ',"special":false'


async def events(
    body: Body, parts: AsyncIterator[GenerateStreamResponse], max_context: int
) -> AsyncGenerator[bytes]:
    """The events of a reply. max_context: tokens of prompt and output together.

    Raises what the server's stream raises, and InternalError if it ends unfinished.
    """
    writer = EventWriter(body, max_context)
    async for part in parts:
        if part.HasField("final"):
            yield writer.finish(part)
            return
        if written := writer.take(part):
            yield written
    raise InternalError("the server ended the stream too soon", reason=Reason.WORKER_ENDED)


class EventWriter:
    """Tokens and text as they come, to events.

    The texts of the tokens that are not special, joined, are the generated text: a token whose text
    is not settled yet (part of a character, or of a stop sequence) has none, and a later one more.
    """

    def __init__(self, body: Body, max_context: int) -> None:
        self._given = given = body.parameters or Parameters()
        self._prompt = body.inputs if given.return_full_text else ""
        self._text: list[str] = []  # all that came
        self._rest = ""  # of it: not in an event yet
        self._waiting: list[Token] = []  # not in an event yet
        self._count = 0  # tokens that came
        self._index = 0  # events written
        # Tokens that may come before one is the last for their number.
        longest_prompt = len(body.inputs.encode()) + MOST_ADDED
        self._free = 0 if given.apply_chat_template else max_context - longest_prompt
        if given.max_new_tokens is not None:
            self._free = given.max_new_tokens

    def take(self, part: GenerateStreamResponse) -> bytes:
        """The events that can be told now, joined."""
        self._add(part)
        if not self._waiting:
            return b""
        last, before = self._waiting[-1], len(self._waiting) - 1
        if last.special:
            # No text comes with a special token: what is there belongs before it.
            return self._write(before, self._last_plain())
        if not self._settled() or self._count >= self._free:
            own = before and self._rest.startswith("".join(t.text for t in self._waiting[:-1]))
            return self._write(before, None if own else before - 1)
        return self._write(before + 1, taker=before)

    def finish(self, part: GenerateStreamResponse) -> bytes:
        """The last events. part: the message with `final`."""
        self._add(part)
        final = part.final
        self._text.append(final.stop_match)
        self._rest += final.stop_match
        # A stream without a token to tell it with: the end has an event of its own all the same.
        self._waiting = self._waiting or [Token(special=True)]
        last = self._waiting[-1]
        written = self._write(len(self._waiting) - 1, self._last_plain())
        text = last.text if last.special and not self._rest else self._rest
        return written + self._event(last, text, self._ending(final))

    def _add(self, part: GenerateStreamResponse) -> None:
        self._text.append(part.text)
        self._rest += part.text
        self._waiting.extend(part.tokens)
        self._count += len(part.tokens)

    def _write(self, count: int, taker: int | None = None) -> bytes:
        """Events of the first waiting tokens. taker: which one gets all the text that is there."""
        written = []
        for index, token in enumerate(self._waiting[:count]):
            if index == taker:
                text, self._rest = self._rest, ""
            elif token.special:
                text = token.text
            elif self._rest.startswith(token.text):
                text, self._rest = token.text, self._rest[len(token.text) :]
            else:
                text = ""
            written.append(self._event(token, text, '"generated_text":null,"details":null'))
        del self._waiting[:count]
        return b"".join(written)

    def _settled(self) -> bool:
        """True if the waiting tokens' text is all there, so that they did not end the reply.

        With stop sequences it must be the text of these very tokens; a space before the first
        may be left out.
        """
        if not self._given.stop:
            return bool(self._rest)
        own = "".join(token.text for token in self._waiting)
        return bool(self._rest) and self._rest in (own, own.removeprefix(" "))

    def _last_plain(self) -> int | None:
        """The last waiting token that is not special, by index."""
        plain = [index for index, token in enumerate(self._waiting) if not token.special]
        return plain[-1] if plain else None

    def _event(self, token: Token, text: str, ending: str) -> bytes:
        """By hand: this runs for every token of every stream."""
        self._index += 1
        likely = ""
        top = ""
        if token.top:
            if count := self._given.return_k_alternatives:
                likely = f',"alternative_tokens":[{_likely(token, count, "")}]'
            if count := self._given.top_n_tokens:
                top = f'"top_tokens":[{_likely(token, count, _NOT_SPECIAL)}],'
        return (
            f'data: {{"index":{self._index},"token":{{"id":{token.id},"text":{json.dumps(text)},'
            f'"logprob":{shown(token.logprob)!r},"special":{_BOOLS[token.special]},'
            f'"skipped":{_BOOLS[is_skipped(token)]}{likely}}},{top}{ending}}}\n\n'
        ).encode()

    def _ending(self, final: GenerateResponse) -> str:
        reason = finish_reason(final)
        text = json.dumps(self._prompt + "".join(self._text))
        details = "null"
        if self._given.details:
            usage = final.usage
            details = json.dumps(
                {
                    "finish_reason": reason,
                    "prompt_tokens": usage.prompt_tokens,
                    "input_length": usage.prompt_tokens,
                    "generated_tokens": usage.generated_tokens,
                    "seed": seed_of(self._given, final),
                }
            )
        return f'"generated_text":{text},"details":{details}'


def _likely(token: Token, count: int, more: str) -> str:
    return ",".join(
        f'{{"id":{other.id},"text":{json.dumps(other.text)},"logprob":{shown(other.logprob)!r}{more}}}'
        for other in token.top[:count]
    )
