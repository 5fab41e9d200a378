"""The client for asyncio, and what both do when a queue is full."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from lorastack.client import (
    AsyncClient,
    Client,
    GenerateRequest,
    GenerateStreamResponse,
    StopParams,
    TokenizeRequest,
)
from lorastack.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.service.conftest import (  # noqa: F401 - fixtures
    client,
    fake,
    folders,
    shapes,
    start_fake,
    tokenizer,
)
from tests.service.fakes import PATIENCE, RunningServer

HELLO = GenerateRequest(prompt="hello", stop=StopParams(max_new_tokens=4))


def test_generation_is_the_sync_clients(client: Client, fake: RunningServer) -> None:  # noqa: F811
    async def ask() -> None:
        async with AsyncClient(fake.address) as ours:
            whole, tokens, info, parts = await asyncio.gather(
                ours.generate(HELLO),
                ours.tokenize(TokenizeRequest(prompt="hello")),
                ours.model_info(),
                collect(ours),
            )
        assert whole.text == client.generate(HELLO).text
        assert "".join(part.text for part in parts) == whole.text
        assert parts[-1].final.usage.generated_tokens == 4
        assert tokens == client.tokenize(TokenizeRequest(prompt="hello"))
        assert info == client.model_info()

    asyncio.run(ask())


async def collect(ours: AsyncClient) -> list[GenerateStreamResponse]:
    return [part async for part in ours.stream(HELLO)]


def test_errors_are_our_classes(fake: RunningServer) -> None:  # noqa: F811
    async def ask() -> None:
        async with AsyncClient(fake.address) as ours:
            with pytest.raises(NotFoundError, match="nobody") as caught:
                await ours.generate(GenerateRequest(prompt="x", lora_id="nobody"))
            assert caught.value.reason is Reason.ADAPTER_NOT_FOUND
            fake.engine.hold()
            with pytest.raises(DeadlineExceededError):
                await ours.generate(HELLO, timeout=0.05)
        async with AsyncClient("127.0.0.1:1") as lonely:
            with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
                await lonely.model_info()

    asyncio.run(ask())
    for kind in (Client, AsyncClient):
        for server in (
            "",
            "localhost",
            "a b:1",
            "h:0",
            "h:65536",
            "::1:50051",
            "caf\udce9:1",
            "h:1\n",
        ):
            with pytest.raises(InvalidArgumentError, match="HOST:PORT"):
                kind(server)


def test_a_stream_that_is_left_is_cancelled(fake: RunningServer) -> None:  # noqa: F811
    fake.engine.hold(2)

    async def ask() -> None:
        async with AsyncClient(fake.address) as ours, aclosing(ours.stream(HELLO)) as parts:  # type: ignore[type-var]
            async for _ in parts:
                break

    asyncio.run(ask())
    fake.engine.wait(lambda: any(call == "cancel" for call, _ in fake.engine.calls))


def refuse(fake: RunningServer, *errors: LorastackError) -> None:  # noqa: F811
    """Makes the next requests fail with these errors, one after the other."""
    left, submit = list(errors), fake.engine.submit

    def refusing(request: object) -> None:
        if left:
            fake.engine.refusal = left.pop(0)
        submit(request)  # type: ignore[arg-type]

    fake.engine.submit = refusing  # type: ignore[method-assign]


def full(delay: float = 0.01) -> ResourceExhaustedError:
    return ResourceExhaustedError("full", retry_after=delay)


def test_a_full_queue_is_tried_again_as_often_as_asked(fake: RunningServer) -> None:  # noqa: F811
    async def ask(retries: int) -> int:
        async with AsyncClient(fake.address, retries=retries) as ours:
            await ours.generate(HELLO)
            return len(await collect(ours))

    refuse(fake, full(), full())
    with Client(fake.address, retries=1) as ours, pytest.raises(ResourceExhaustedError) as caught:
        ours.generate(HELLO)
    assert caught.value.retry_after == pytest.approx(0.01)
    busy = ResourceExhaustedError("busy", reason=Reason.TOO_MANY_CALLS, retry_after=0.01)
    refuse(fake, full(), busy)
    with Client(fake.address, retries=2) as ours:
        assert ours.generate(HELLO).text
        refuse(fake, full(), full())
        assert list(ours.stream(HELLO))[-1].HasField("final")
    refuse(fake, full(), full())
    assert asyncio.run(ask(2)) > 1
    refuse(fake, full())
    with pytest.raises(ResourceExhaustedError):
        asyncio.run(ask(0))


def test_what_does_not_pass_is_not_tried_again(fake: RunningServer) -> None:  # noqa: F811
    pinned = ResourceExhaustedError("pinned", reason=Reason.DEVICE_MEMORY_PINNED)
    with Client(fake.address, retries=9) as ours:
        refuse(fake, pinned)
        with pytest.raises(ResourceExhaustedError, match="pinned"):
            ours.generate(HELLO)
        refuse(fake, full(delay=PATIENCE * 10))  # the deadline comes first
        with pytest.raises(ResourceExhaustedError, match="full"):
            ours.generate(HELLO, timeout=PATIENCE)
        assert ours.generate(HELLO, timeout=1e300).text  # as good as none
