"""What streams of completions and chats share: the rows' chunks, the usage, the end."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from lorastack.client import GenerateResponse, GenerateStreamResponse
from lorastack.gateway.openai.bodies import GenerationBody
from lorastack.gateway.openai.refusals import DONE
from lorastack.gateway.openai.replies import Head, usage
from lorastack.gateway.openai.rows import Rows


class RowChunks(Protocol):
    """Makes one row's chunks."""

    def chunk(self, part: GenerateStreamResponse) -> bytes:
        """b"": there is nothing to say."""
        ...

    def end(self, final: GenerateResponse) -> bytes:
        """The last one. It may take out of `final` what the reply leaves out."""
        ...


def wants_usage(body: GenerationBody) -> bool:
    """True if the last chunk tells the tokens used."""
    options = body.stream_options
    return options is not None and options.include_usage


async def chunks(
    top: Head, rows: Rows, streams: Sequence[RowChunks], num_choices: int, with_usage: bool
) -> AsyncGenerator[bytes]:
    """All rows' chunks as they come. streams: one a row; num_choices: rows of one prompt."""
    finals = [GenerateResponse() for _ in streams]
    async for row, part in rows.parts:
        if not part.HasField("final"):
            if chunk := streams[row].chunk(part):
                yield chunk
            continue
        finals[row] = part.final
        yield streams[row].end(part.final)
    if with_usage:
        yield top.chunk([], usage=usage(finals, num_choices).model_dump())
    yield DONE
