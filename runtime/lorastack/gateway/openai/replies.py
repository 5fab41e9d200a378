"""What replies to completions and chats share: their head, usage, reasons, log-probabilities."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lorastack.client import GenerateResponse, Token
from lorastack.gateway.openai.convert import Wanted

TEXT = "\0"  # where the text of `Chunks` goes
LOWEST = -9999.0  # JSON has no infinity
_REASONS = {
    GenerateResponse.LENGTH: "length",
    GenerateResponse.EOS: "stop",
    GenerateResponse.STOP_SEQUENCE: "stop",
    GenerateResponse.STOP_TOKEN: "stop",
    GenerateResponse.CANCELLED: "length",
    GenerateResponse.TIME_LIMIT: "length",
}


class PromptTokensDetails(BaseModel):
    """Of `Usage`."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all rows; a prompt of several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class LoraReport(BaseModel):
    """A LoRA that was used."""

    lora_id: str
    digest: str
    scale: float


class SpeculationReport(BaseModel):
    """Counts of all rows."""

    steps: int
    drafted_tokens: int
    accepted_tokens: int


class Report(BaseModel):
    """What OpenAI's replies have no place for. seeds: of the rows, in order."""

    loras: list[LoraReport]
    medusa_id: str
    medusa_digest: str
    seeds: list[int]
    speculation: SpeculationReport


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a reply and of its every chunk."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self) -> dict[str, Any]:
        """As in the reply."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> bytes:
        """A streamed chunk, made the slow way; `Chunks` makes those of every token."""
        return _event({**self.fields(), "choices": choices, **more})


def head(prefix: str, kind: str, model: str, wanted: Wanted) -> Head:
    """Of a new reply. prefix: of its id."""
    name = f"{prefix}-{secrets.token_hex(16)}"
    return Head(name, kind, int(time.time()), model, wanted.fingerprint)


class Chunks:
    """The chunks of one row that hold nothing but text: all but the text is made once."""

    def __init__(self, head: Head, choice: dict[str, Any], with_usage: bool) -> None:
        """choice: of a chunk, with TEXT where the text goes, and no other text behind it."""
        chunk = {**head.fields(), "choices": [choice], **no_usage(with_usage)}
        before, _, after = json.dumps(chunk).rpartition(json.dumps(TEXT))
        self._before, self._after = f"data: {before}", f"{after}\n\n"

    def chunk(self, text: str) -> bytes:
        """One chunk. The JSON is ASCII: some readers end lines at Unicode's separators too."""
        return f"{self._before}{json.dumps(text)}{self._after}".encode()


def no_usage(with_usage: bool) -> dict[str, Any]:
    """In every chunk but the last, if that tells the usage."""
    return {"usage": None} if with_usage else {}


def finish_reason(final: GenerateResponse) -> str:
    """As OpenAI has it; what was cut short for any reason is "length"."""
    return _REASONS.get(final.finish_reason, "length")


def usage(finals: Sequence[GenerateResponse], num_choices: int) -> Usage:
    """finals: every prompt's choices, one prompt after the other."""
    firsts = finals[::num_choices]
    prompt = sum(each.usage.prompt_tokens for each in firsts)
    completion = sum(each.usage.generated_tokens for each in finals)
    cached = sum(each.usage.cached_prompt_tokens for each in firsts)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def report(finals: Sequence[GenerateResponse]) -> Report:
    """Adapters are the same for all rows."""
    used, stats = finals[0].adapters, [each.speculation for each in finals]
    return Report(
        loras=[
            LoraReport(lora_id=each.lora_id, digest=each.digest, scale=each.scale)
            for each in used.loras
        ],
        medusa_id=used.medusa_id,
        medusa_digest=used.medusa_digest,
        seeds=[each.seed for each in finals],
        speculation=SpeculationReport(
            steps=sum(each.steps for each in stats),
            drafted_tokens=sum(each.drafted_tokens for each in stats),
            accepted_tokens=sum(each.accepted_tokens for each in stats),
        ),
    )


def chat_logprobs(tokens: Iterable[Token], num_top: int) -> dict[str, Any]:
    """A choice's `logprobs` in a chat."""
    return {
        "content": [
            {
                **_entry(token.text, token.logprob),
                "top_logprobs": [_entry(each.text, each.logprob) for each in token.top[:num_top]],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Iterable[Token], offset: int) -> dict[str, Any]:
    """A choice's `logprobs` in a completion. offset: of the first token's text, in characters."""
    texts: list[str] = []
    offsets: list[int] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        texts.append(token.text)
        offsets.append(offset)
        offset += len(token.text)
        if not token.HasField("logprob"):  # nothing stands before a prompt's first token
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(token.logprob, LOWEST))
        top: dict[str, float] = {}
        for each in token.top:
            top.setdefault(each.text, max(each.logprob, LOWEST))
        top.setdefault(token.text, max(token.logprob, LOWEST))
        tops.append(top)
    return {
        "text_offset": offsets,
        "token_logprobs": logprobs,
        "tokens": texts,
        "top_logprobs": tops,
    }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character has no text of its own, and so no known bytes.
    known = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": max(logprob, LOWEST), "bytes": known}


def _event(content: Any) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()
