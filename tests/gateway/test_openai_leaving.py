"""A caller of the OpenAI API who leaves ends its rows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.gateway.openai_asks import CHAT, PROMPT
from tests.helpers.live import LiveServer, wait_until


@pytest.fixture
def cancels(served: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the rows that are cancelled."""
    seen: list[str] = []
    cancel = served.engine.cancel

    def record(request_id: str) -> None:
        seen.append(request_id)
        cancel(request_id)

    monkeypatch.setattr(served.engine, "cancel", record)
    return seen


LONG: Any = {"temperature": 0, "max_tokens": 16_000, "extra_body": {"ignore_eos": True}}


@pytest.mark.parametrize("n", [1, 3])
def test_a_caller_who_leaves_a_stream_ends_every_choice(
    client: OpenAI, served: LiveServer, base: str, cancels: list[str], n: int
) -> None:
    stream = client.completions.create(model=base, prompt=PROMPT, n=n, stream=True, **LONG)
    next(iter(stream))
    stream.close()
    served.assert_idle()  # long before the rows could end by themselves
    assert cancels


def test_a_caller_who_leaves_ends_every_choice(
    base_url: str, served: LiveServer, base: str, cancels: list[str]
) -> None:
    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="x", max_retries=0) as client:
            asking = asyncio.create_task(
                client.chat.completions.create(model=base, messages=CHAT, n=3, **LONG)
            )
            await asyncio.to_thread(wait_until, lambda: served.engine.num_rows == 3, "all rows run")
            asking.cancel()
            await asyncio.wait([asking])

    asyncio.run(run())
    wait_until(lambda: len(set(cancels)) == 3, "all rows are cancelled")
    served.assert_idle()
