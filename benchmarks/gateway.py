"""What does HTTP cost beside gRPC? 32 concurrent streams, their rate and their first tokens.

One server with its gateway in the same process; the default model in bfloat16, greedy, the same
prompts. /v1/completions over plain sockets and GenerateStream take turns; medians over rounds, the
first of which warms up.

    python -m benchmarks.gateway
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from benchmarks.report import report
from examples.local_server import local_server
from lorastack.client import AsyncClient, GenerateRequest

HOST = "127.0.0.1"
FLOOR, SLOWER = 0.95, 3.0  # of gRPC's rate; ms on its first token


@dataclass(frozen=True, slots=True)
class Round:
    """rate: tokens a second of all streams together; first: seconds to each first token."""

    rate: float
    first: Sequence[float]


Stream = Callable[[str, int], Awaitable[float]]  # a prompt and its tokens -> the first's seconds


def main(
    rounds: Annotated[int, typer.Option(min=1, help="After the one that warms up.")] = 7,
    streams: Annotated[int, typer.Option(min=1, help="Concurrent ones.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Of each stream.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the server.")] = 2,
) -> None:
    """Print a table and a line of JSON."""
    port = _free_port()
    options = ("--dtype", "bfloat16", "--threads", str(threads), "--http-port", str(port))
    with local_server(*options, "--max-rows", str(streams)) as server:
        results = asyncio.run(_measure(server.address, port, rounds, streams, tokens))
    rows = [_row(name, each) for name, each in results.items()]
    pairs = list(zip(results["HTTP"], results["gRPC"], strict=True))
    rate = statistics.median(http.rate / grpc.rate for http, grpc in pairs)
    later = 1000 * statistics.median(_first(http) - _first(grpc) for http, grpc in pairs)
    report(
        f"{streams} streams of {tokens} tokens (medians of {rounds} rounds)",
        rows,
        rate_ratio=f"{rate:.3f} (at least {FLOOR})",
        first_token_later_ms=f"{later:.1f} (at most {SLOWER})",
    )


async def _measure(
    server: str, port: int, rounds: int, streams: int, tokens: int
) -> dict[str, list[Round]]:
    async with AsyncClient(server) as client:
        model = (await client.model_info()).base_model

        async def grpc(prompt: str, tokens: int) -> float:
            return await _grpc(client, prompt, tokens)

        async def http(prompt: str, tokens: int) -> float:
            return await _http(port, model, prompt, tokens)

        ways: dict[str, Stream] = {"gRPC": grpc, "HTTP": http}
        results: dict[str, list[Round]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            names = list(ways) if number % 2 else list(reversed(ways))
            for way in names:
                # Prompts of their own, so that neither finds the other's in the prefix cache.
                prompts = [f"{way} {number}, {i}: the sea" for i in range(streams)]
                began = time.perf_counter()
                first = await asyncio.gather(*(ways[way](prompt, tokens) for prompt in prompts))
                rate = streams * tokens / (time.perf_counter() - began)
                if number:
                    results[way].append(Round(rate, first))
    return results


async def _grpc(client: AsyncClient, prompt: str, tokens: int) -> float:
    request = GenerateRequest(prompt=prompt, medusa_id="none")
    request.stop.max_new_tokens, request.stop.ignore_eos = tokens, True
    began, first = time.perf_counter(), 0.0
    async for _ in client.stream(request):
        first = first or time.perf_counter() - began
    return first


async def _http(port: int, model: str, prompt: str, tokens: int) -> float:
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "medusa_id": "none",
        }
    )
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    began, first = time.perf_counter(), 0.0
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status!r} {await reader.read()!r}")
    while line := await reader.readline():
        if not first and line.startswith(b"data:"):
            first = time.perf_counter() - began
    writer.close()
    return first


def _first(each: Round) -> float:
    return statistics.median(each.first)


def _row(name: str, rounds: Sequence[Round]) -> dict[str, object]:
    return {
        "way": name,
        "tokens/s": f"{statistics.median(each.rate for each in rounds):.1f}",
        "first token, ms": f"{1000 * statistics.median(map(_first, rounds)):.1f}",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    typer.run(main)
