"""Many readers of streams, a third of whom vanish: nothing of them stays."""

from __future__ import annotations

import asyncio
import gc
import random

import psutil
import pytest

from tests.gateway.small import post, small_gateway
from tests.helpers.live import LiveServer, wait_until

PATIENCE = 300.0
NAMES = ("say-owl", "say-bat", "random-a", "random-b")


@pytest.mark.parametrize("num_clients", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_everything_returns_to_zero(served: LiveServer, num_clients: int) -> None:
    with small_gateway(served.server.address) as gateway:
        ended = asyncio.run(crowd(gateway.address, num_clients))
        num_stayed = sum(1 for i in range(num_clients) if i % 3)
        assert ended == ["whole"] * num_stayed
        traffic = gateway._server._traffic
        wait_until(lambda: traffic.num_open == 0, "all exchanges end")
        wait_until(lambda: not gateway._server.server_state.tasks, "all tasks end")
        wait_until(lambda: not gateway._server.server_state.connections, "all connections close")
        assert traffic._held == 0
    served.assert_idle()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_stays_flat(served: LiveServer) -> None:
    """Waves of 500 clients after two that fill caches and the allocator's arenas."""
    process = psutil.Process()
    with small_gateway(served.server.address) as gateway:
        sizes = []
        for _ in range(6):
            asyncio.run(crowd(gateway.address, 500))
            served.assert_idle()
            gc.collect()
            sizes.append(process.memory_info().rss >> 20)
    assert max(sizes[2:]) - sizes[1] < 32, f"MiB: {sizes}"


async def crowd(address: str, num_clients: int) -> list[str]:
    """How the streams of those who stay end."""
    rng = random.Random(7)
    async with asyncio.timeout(PATIENCE):
        clients = (client(address, i, rng.random()) for i in range(num_clients))
        ends = await asyncio.gather(*clients)
    return [end for end in ends if end != "vanished"]


async def client(address: str, number: int, when: float) -> str:
    """Every third client vanishes: at once, before the first token, or somewhere in the stream."""
    host, _, port = address.rpartition(":")
    body = {"prompt": f"hello {number}", "max_new_tokens": 24, "lora": NAMES[number % len(NAMES)]}
    while True:
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(post("/stream", body, head="Connection: close\r\n"))
            if number % 3 == 0:
                if number % 2:
                    await reader.read(int(when * 2000) + 1)
                writer.transport.abort()
                return "vanished"
            reply = await reader.read()
        finally:
            writer.close()
        if reply.startswith(b"HTTP/1.1 429"):
            await asyncio.sleep(0.2)
            continue
        assert reply.startswith(b"HTTP/1.1 200"), reply
        return "whole" if reply.endswith(b"0\r\n\r\n") else "torn"
