"""GET /v1/models: the base model and every adapter that it can run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from lorastack.client import Adapter, GetModelInfoResponse
from lorastack.errors import NotFoundError
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.openai.refusals import refuse
from lorastack.gateway.upstream import Upstream

OWNER = "lorastack"
PATIENCE = 10.0  # seconds for the server's answer


class Model(BaseModel):
    """root: the digest of an adapter's content, or the base's own id. parent: an adapter's base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = OWNER
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    """The base comes first."""

    object: Literal["list"] = "list"
    data: list[Model]


def operations(upstream: Upstream) -> list[Operation[Any]]:
    """GET /v1/models and /v1/models/{id}; an id may hold a slash."""

    async def listed(call: Call, body: None) -> Reply:
        info = await upstream.info()
        adapters = await upstream.client.list_adapters(timeout=PATIENCE)
        models = [_adapter(each, info) for each in adapters if each.compatible]
        return Reply(ModelList(data=[_base(info), *models]))

    async def one(call: Call, body: None) -> Reply:
        info, name = await upstream.info(), call.path_params["model"]
        if name == info.base_model:
            return Reply(_base(info))
        adapter = await upstream.client.get_adapter(name, timeout=PATIENCE)
        if not adapter.compatible:
            raise NotFoundError(f"{name!r} is of another base model than {info.base_model}")
        return Reply(_adapter(adapter, info))

    return [
        Operation(
            method="GET",
            path="/v1/models",
            summary="The base model and its adapters",
            handle=listed,
            refuse=refuse,
            reply=ModelList,
        ),
        Operation(
            method="GET",
            path="/v1/models/{model:path}",
            summary="One model",
            handle=one,
            refuse=refuse,
            reply=Model,
        ),
    ]


def _base(info: GetModelInfoResponse) -> Model:
    # When the base was made is not known; 0 is OpenAI's "long ago" as well.
    return Model(
        id=info.base_model,
        created=0,
        root=info.base_model,
        max_model_len=info.limits.max_context,
    )


def _adapter(adapter: Adapter, info: GetModelInfoResponse) -> Model:
    return Model(
        id=adapter.id,
        created=adapter.created_at.seconds,
        root=adapter.digest,
        parent=info.base_model,
        max_model_len=info.limits.max_context,
    )
