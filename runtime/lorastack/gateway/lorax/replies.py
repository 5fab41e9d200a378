"""Whole replies of LoRAX and TGI.

generated_text ends with the stop sequence that ended it, if one did: so it is with LoRAX and TGI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorastack.client import GenerateResponse, Token
from lorastack.errors import InternalError, Reason
from lorastack.gateway.lorax.bodies import Body, Parameters
from lorastack.gateway.lorax.requests import is_sampled, wants_details

LEAST_LOGPROB = -9999.0  # JSON has no infinity

_REASONS = {
    GenerateResponse.LENGTH: "length",
    GenerateResponse.TIME_LIMIT: "length",
    GenerateResponse.EOS: "eos_token",
    GenerateResponse.STOP_SEQUENCE: "stop_sequence",
    GenerateResponse.STOP_TOKEN: "stop_sequence",
}


def finish_reason(final: GenerateResponse) -> str:
    """In LoRAX's words. Raises InternalError for a row that was cancelled."""
    reason = _REASONS.get(final.finish_reason)
    if reason is None:
        raise InternalError("the server ended the generation early", reason=Reason.STEP_FAILED)
    return reason


def seed_of(given: Parameters, final: GenerateResponse) -> int | None:
    """The seed of a sampled reply."""
    return final.seed if is_sampled(given) else None


def is_skipped(token: Token) -> bool:
    """True for a drafted token: the model took no step of its own for it."""
    return token.source not in (Token.SOURCE_UNSPECIFIED, Token.MODEL)


def shown(logprob: float) -> float:
    """A logarithm of probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def whole(body: Body, reply: GenerateResponse) -> dict[str, Any]:
    """The JSON of a reply."""
    given = body.parameters or Parameters()
    prompt = body.inputs if given.return_full_text else ""
    content: dict[str, Any] = {"generated_text": prompt + reply.text + reply.stop_match}
    if wants_details(given):
        content["details"] = _details(given, reply)
    return content


def headers(reply: GenerateResponse) -> dict[str, str]:
    """TGI's headers: tokens, and times in milliseconds."""
    timings, usage = reply.timings, reply.usage
    inference = max(0.0, timings.total_ms - timings.queue_ms)
    return {
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.generated_tokens),
        "x-total-time": f"{timings.total_ms:.0f}",
        "x-queue-time": f"{timings.queue_ms:.0f}",
        "x-inference-time": f"{inference:.0f}",
        "x-time-per-token": f"{inference / max(1, usage.generated_tokens):.0f}",
    }


def _details(given: Parameters, reply: GenerateResponse) -> dict[str, Any]:
    details = {
        "finish_reason": finish_reason(reply),
        "prompt_tokens": reply.usage.prompt_tokens,
        "generated_tokens": reply.usage.generated_tokens,
        "skipped_tokens": sum(map(is_skipped, reply.tokens)),
        "seed": seed_of(given, reply),
        "prefill": [_prefill(token) for token in reply.prompt_tokens],
        "tokens": [_token(token, given.return_k_alternatives) for token in reply.tokens],
    }
    if given.top_n_tokens:
        details["top_tokens"] = [_top(token, given.top_n_tokens) for token in reply.tokens]
    return details


def _prefill(token: Token) -> dict[str, Any]:
    logprob = shown(token.logprob) if token.HasField("logprob") else None
    return {"id": token.id, "text": token.text, "logprob": logprob}


def _token(token: Token, alternatives: int | None) -> dict[str, Any]:
    content: dict[str, Any] = {
        "id": token.id,
        "text": token.text,
        "logprob": shown(token.logprob),
        "special": token.special,
        "skipped": is_skipped(token),
    }
    if alternatives:
        content["alternative_tokens"] = _likely(token, alternatives)
    return content


def _top(token: Token, count: int) -> Sequence[dict[str, Any]]:
    return [{**other, "special": False} for other in _likely(token, count)]


def _likely(token: Token, count: int) -> list[dict[str, Any]]:
    return [
        {"id": other.id, "text": other.text, "logprob": shown(other.logprob)}
        for other in token.top[:count]
    ]
