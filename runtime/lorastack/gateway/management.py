"""Adapters loaded and unloaded by name, as vLLM's and SGLang's controllers do.

A name is loaded while all that it stands for is pinned to the device: the server's own state, so
every gateway and `lorastack adapters load --pin` agree on it, and a restart forgets it as vLLM's
does. Nothing here deletes: an unloaded adapter stays in the store.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal
from weakref import WeakValueDictionary

from pydantic import BaseModel, ConfigDict, Field

from lorastack.client import Adapter, Client
from lorastack.errors import (
    AlreadyExistsError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.statuses import http_status
from lorastack.gateway.upstream import Upstream

MAX_NAME = 256  # characters; ids are shorter
MAX_PATH = 4096
HUB = "hf://"
_REVISION = re.compile(r"[!-?A-~]{0,200}")  # printable ASCII without "@"
NO_HEADS = "none"  # an alias's heads: not an id


class LoadBody(BaseModel):
    """vLLM's LoadLoRAAdapterRequest."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(max_length=MAX_NAME)
    lora_path: str = Field(max_length=MAX_PATH)
    load_inplace: bool = False
    is_3d_lora_weight: Literal[False] = False


class UnloadBody(BaseModel):
    """vLLM's UnloadLoRAAdapterRequest. lora_int_id: vLLM's own number, without a meaning here."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(max_length=MAX_NAME)
    lora_int_id: int | None = None


class SglangLoadBody(BaseModel):
    """SGLang's. pinned: what is loaded over HTTP always is."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(max_length=MAX_NAME)
    lora_path: str = Field(max_length=MAX_PATH)
    pinned: bool = False


class SglangUnloadBody(BaseModel):
    """SGLang's."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str = Field(max_length=MAX_NAME)


class SglangReply(BaseModel):
    """SGLang's. loaded_adapters: name -> digest, of all that are pinned."""

    success: bool
    error_message: str | None = None
    loaded_adapters: dict[str, str] = {}


def operations(upstream: Upstream) -> list[Operation[Any]]:
    """vLLM's two under /v1, and SGLang's two."""
    loader = Loader(upstream)

    async def load(call: Call, body: LoadBody) -> Reply:
        await loader.load(body.lora_name, body.lora_path, body.load_inplace)
        return _text(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(call: Call, body: UnloadBody) -> Reply:
        await loader.unload(body.lora_name)
        return _text(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def sglang_load(call: Call, body: SglangLoadBody) -> Reply:
        await loader.load(body.lora_name, body.lora_path, False)
        return Reply(SglangReply(success=True, loaded_adapters=await loader.loaded()))

    async def sglang_unload(call: Call, body: SglangUnloadBody) -> Reply:
        await loader.unload(body.lora_name)
        return Reply(SglangReply(success=True, loaded_adapters=await loader.loaded()))

    add, remove = "Load an adapter onto the device", "Unload an adapter; the store keeps it"
    ours: dict[str, Any] = {"method": "POST", "refuse": refuse, "status_of": status}
    sglang: dict[str, Any] = {
        "method": "POST",
        "refuse": _sglang_refuse,
        "status_of": _sglang_status,
        "reply": SglangReply,
    }
    return [
        Operation(path="/v1/load_lora_adapter", summary=add, handle=load, body=LoadBody, **ours),
        Operation(
            path="/v1/unload_lora_adapter", summary=remove, handle=unload, body=UnloadBody, **ours
        ),
        Operation(
            path="/load_lora_adapter",
            summary=add,
            handle=sglang_load,
            body=SglangLoadBody,
            **sglang,
        ),
        Operation(
            path="/unload_lora_adapter",
            summary=remove,
            handle=sglang_unload,
            body=SglangUnloadBody,
            **sglang,
        ),
    ]


class Loader:
    """Loads and unloads, one call a name at a time. For one event loop."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._running: set[asyncio.Task[None]] = set()

    async def load(self, name: str, path: str, in_place: bool) -> None:
        """Brings what `path` names onto the device as `name`, pinned.

        path: an id of the store, "hf://org/name[@revision]", or an absolute folder of the server's
        machine; the server's policy says which of these may be pulled. A load goes on when its
        caller leaves, so that who comes back finds it done. Raises AlreadyExistsError if the name
        is loaded and may not be replaced.
        """
        if not name or not path:
            raise InvalidArgumentError(
                "Both 'lora_name' and 'lora_path' must be provided.",
                field="lora_name" if not name else "lora_path",
            )
        await self._alone(name, lambda: self._load(name, path, in_place))

    async def unload(self, name: str) -> None:
        """Takes the pins and the copies in memory. Raises NotFoundError if it is not loaded."""
        if not name:
            raise InvalidArgumentError("'lora_name' must be provided.", field="lora_name")
        await self._alone(name, lambda: self._unload(name))

    async def loaded(self) -> dict[str, str]:
        """Id -> digest, of what is pinned."""
        adapters = await self._upstream.client.list_adapters()
        return {each.id: each.digest for each in adapters if each.pinned}

    async def _load(self, name: str, path: str, in_place: bool) -> None:
        client = self._upstream.client
        before = known = await self._find(name)
        if not in_place and known is not None and all(await self._pins(known)):
            raise AlreadyExistsError(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
        if path.startswith(HUB):
            hub_id, _, revision = path.removeprefix(HUB).partition("@")
            if not _REVISION.fullmatch(revision):
                raise InvalidArgumentError(
                    f"lora_path: write {HUB}org/name, or {HUB}org/name@revision", field="lora_path"
                )
            known = await client.pull(name, hub_id=hub_id, revision=revision)
        elif path.startswith("/"):
            known = await client.pull(name, folder=path)
        elif path != name:
            known = await self._alias(name, path, known)
        elif known is None:
            raise _unknown(path)
        for part in _parts(known):
            await client.load(part, pin=True)
        if before is not None and before.pinned and before.digest != known.digest:
            await client.unload(f"{name}@{before.digest}")  # a pin is on the content

    async def _unload(self, name: str) -> None:
        adapter = await self._find(name)
        if adapter is None or not any(await self._pins(adapter)):
            raise NotFoundError(f"The lora adapter '{name}' cannot be found.", adapter_id=name)
        for part in _parts(adapter):
            await self._upstream.client.unload(part)

    async def _alias(self, name: str, path: str, known: Adapter | None) -> Adapter:
        """The alias `name` of the id `path`, made anew or pointed there."""
        target = await self._find(path)
        if target is None:
            raise _unknown(path)
        if known is not None and known.kind != Adapter.ALIAS:
            raise InvalidArgumentError(
                f"'{name}' is an adapter of its own, so it cannot stand for '{path}': choose "
                f"another lora_name, or give lora_path '{name}'",
                field="lora_name",
            )
        if target.kind == Adapter.ALIAS:
            loras = [(each.lora_id, each.scale) for each in target.alias_loras]
            heads = target.alias_medusa_id
        elif target.kind == Adapter.MEDUSA:
            loras, heads = [], path
        else:
            loras, heads = [(path, 1.0)], ""
        if known is not None:
            same = [(each.lora_id, each.scale) for each in known.alias_loras]
            if (same, known.alias_medusa_id) == (loras, heads):
                return known
        return await asyncio.to_thread(_store_alias, self._upstream.target, name, loras, heads)

    async def _find(self, adapter_id: str) -> Adapter | None:
        try:
            return await self._upstream.client.get_adapter(adapter_id)
        except NotFoundError:
            return None

    async def _pins(self, adapter: Adapter) -> list[bool]:
        if adapter.kind != Adapter.ALIAS:
            return [adapter.pinned]
        found = [await self._find(part) for part in _parts(adapter)]
        return [part is not None and part.pinned for part in found]

    async def _alone(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs `work` when no other for this name runs; it goes on when the caller is cancelled."""
        task = asyncio.create_task(self._locked(name, work))
        self._running.add(task)
        task.add_done_callback(self._done)
        await asyncio.shield(task)

    async def _locked(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        async with lock:
            await work()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # read, as its caller may have gone


def _parts(adapter: Adapter) -> list[str]:
    """The ids that have copies on the device."""
    if adapter.kind != Adapter.ALIAS:
        return [adapter.id]
    heads = adapter.alias_medusa_id
    parts = [each.lora_id for each in adapter.alias_loras]
    return [*parts, heads] if heads not in ("", NO_HEADS) else parts


def _store_alias(
    target: str, name: str, loras: Sequence[tuple[str, float]], medusa_id: str
) -> Adapter:
    with Client(target) as client:
        return client.alias(name, loras, medusa_id)


def _unknown(path: str) -> LorastackError:
    return NotFoundError(
        f"lora_path: no adapter '{path[:200]}' in the registry; name one that `lorastack adapters "
        f"list` shows, {HUB}org/name, or an absolute folder below the server's --pull-root",
        adapter_id=path[:200],
    )


_TYPES: dict[type[LorastackError], str] = {
    InvalidArgumentError: "InvalidUserInput",
    AlreadyExistsError: "InvalidUserInput",
    NotFoundError: "NotFoundError",
    PermissionDeniedError: "PermissionDeniedError",
    ResourceExhaustedError: "RateLimitError",
    UnavailableError: "ServiceUnavailableError",
}


def refuse(error: LorastackError, status: int) -> dict[str, Any]:
    """vLLM's error, under "error" as it is now and at the top as controllers still read it."""
    kind = _TYPES.get(type(error), "BadRequestError" if status < 500 else "InternalServerError")
    fields = {
        "message": error.message,
        "type": kind,
        "param": error.metadata.get("field"),
        "code": status,
    }
    return {**fields, "error": fields}


def _sglang_refuse(error: LorastackError, status: int) -> SglangReply:
    return SglangReply(success=False, error_message=error.message)


def _sglang_status(error: LorastackError) -> int:
    """400 for everything that the caller can change."""
    status = http_status(error)
    return 400 if status < 500 and status != 429 else status


def status(error: LorastackError) -> int:
    """As vLLM: what is loaded already is 400. A full device does not pass by waiting: 400 too."""
    if isinstance(error, AlreadyExistsError) or error.reason is Reason.DEVICE_MEMORY_PINNED:
        return 400
    return http_status(error)


def _text(content: str) -> Reply:
    return Reply(content.encode())
