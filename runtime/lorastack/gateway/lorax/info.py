"""GET /info and POST /tokenize."""

from __future__ import annotations

from typing import Any

from lorastack.client import GetModelInfoResponse
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.lorax.bodies import Info, TokenizeBody
from lorastack.gateway.lorax.refusals import refuse, status_of
from lorastack.gateway.upstream import Upstream

MAX_STOP_SEQUENCES = 16  # the server's own limit


def operations(upstream: Upstream) -> list[Operation[Any]]:
    """What tells of the model."""

    async def info(call: Call, body: None) -> Reply:
        return Reply(_info(await upstream.info()))

    async def tokenize(call: Call, body: TokenizeBody) -> Reply:
        if body.add_special_tokens is False:
            raise InvalidArgumentError(
                "add_special_tokens: false is not served here; leave it out",
                field="add_special_tokens",
            )
        reply = await upstream.client.token_spans(body.inputs)
        return Reply(
            [
                {"id": token_id, "text": span.text, "start": span.start, "stop": span.stop}
                for token_id, span in zip(reply.token_ids, reply.spans, strict=True)
            ]
        )

    return [
        Operation(
            method="POST",
            path="/tokenize",
            summary="The prompt's tokens: a list of id, text, start and stop",
            handle=tokenize,
            refuse=refuse,
            body=TokenizeBody,
            status_of=status_of,
        ),
        Operation(
            method="GET",
            path="/info",
            summary="The model and its limits",
            handle=info,
            refuse=refuse,
            reply=Info,
            status_of=status_of,
        ),
    ]


def _info(info: GetModelInfoResponse) -> Info:
    longest = info.limits.max_context
    return Info(
        model_id=info.base_model,
        model_sha=info.fingerprint or None,
        model_dtype=f"torch.{info.dtype}",
        model_device_type=info.device,
        model_pipeline_tag="text-generation",
        max_concurrent_requests=info.limits.max_rows + info.limits.max_queue,
        max_best_of=1,
        max_stop_sequences=MAX_STOP_SEQUENCES,
        max_input_length=longest - 1,
        max_input_tokens=longest - 1,
        max_total_tokens=longest,
        version=info.version,
        sha=None,
        docker_label=None,
    )
