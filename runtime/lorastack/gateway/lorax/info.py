"""GET /info."""

from __future__ import annotations

from typing import Any

from lorastack.client import GetModelInfoResponse
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.lorax.bodies import Info
from lorastack.gateway.lorax.refusals import refuse, status_of
from lorastack.gateway.upstream import Upstream

MAX_STOP_SEQUENCES = 16  # the server's own limit


def operations(upstream: Upstream) -> list[Operation[Any]]:
    """What tells of the model."""

    async def info(call: Call, body: None) -> Reply:
        return Reply(_info(await upstream.info()))

    return [
        Operation(
            method="GET",
            path="/info",
            summary="The model and its limits",
            handle=info,
            refuse=refuse,
            reply=Info,
            status_of=status_of,
        )
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
