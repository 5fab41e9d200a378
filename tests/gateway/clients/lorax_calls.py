"""Runs calls of lorax-client, in its own environment: base URL as argument, cases as JSON on stdin.

A case: {"client": "sync" or "async", "method": its name, "arguments": {...}}. Prints a JSON list:
{"reply": ...}, {"parts": [...]}, or {"error": class name, "message": ...}.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from lorax import AsyncClient, Client
from lorax.types import MergedAdapters


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    given = dict(case["arguments"])
    if "merged_adapters" in given:
        given["merged_adapters"] = MergedAdapters(**given["merged_adapters"])
    return given


def plain(reply: Any) -> Any:
    return json.loads(reply.model_dump_json())


def run(base_url: str, case: dict[str, Any]) -> dict[str, Any]:
    client, given = Client(base_url, timeout=240), arguments(case)
    if case["method"] == "generate":
        return {"reply": plain(client.generate(**given))}
    return {"parts": [plain(part) for part in client.generate_stream(**given)]}


async def run_async(base_url: str, case: dict[str, Any]) -> dict[str, Any]:
    client, given = AsyncClient(base_url, timeout=240), arguments(case)
    if case["method"] == "generate":
        return {"reply": plain(await client.generate(**given))}
    return {"parts": [plain(part) async for part in client.generate_stream(**given)]}


def main() -> None:
    results = []
    for case in json.load(sys.stdin):
        try:
            if case["client"] == "sync":
                results.append(run(sys.argv[1], case))
            else:
                results.append(asyncio.run(run_async(sys.argv[1], case)))
        except Exception as error:
            results.append({"error": type(error).__name__, "message": str(error)})
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
