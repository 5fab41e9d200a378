"""How much memory does a server take? Resident bytes of its process in bfloat16, after work.

SmolLM2-135M, eight adapters of distinct digests in memory (the examples and copies of three),
16 requests over all of them.

    python -m benchmarks.memory
"""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import typer

from examples.local_server import ADAPTERS, local_server, upload_examples
from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1.adapters_pb2 import Adapter

NUM_ADAPTERS = 8
MIB = 1 << 20


def main() -> None:
    """Print the resident memory and what it holds as a JSON line."""
    with local_server("--dtype", "bfloat16") as server, Client(server.address) as client:
        process = psutil.Process(server.pid)
        started = process.memory_info().rss
        adapters = upload(client)
        with ThreadPoolExecutor(len(adapters)) as pool:
            list(pool.map(lambda adapter: client.generate(request(adapter)), adapters * 2))
        resident = [client.get_adapter(adapter.id) for adapter in adapters]
        assert all(a.residency == Adapter.DEVICE for a in resident), "not all adapters are loaded"
        typer.echo(
            json.dumps(
                {
                    "started_mib": started // MIB,
                    "resident_mib": process.memory_info().rss // MIB,
                    "adapters": len(resident),
                    "adapter_mib": round(sum(a.device_bytes for a in resident) / MIB, 1),
                }
            )
        )


def upload(client: Client) -> list[Adapter]:
    """The examples, and copies whose config names no base, which makes other digests of them."""
    examples = upload_examples(client)
    adapters = list(examples.values())
    with tempfile.TemporaryDirectory() as scratch:
        for name in list(examples)[: NUM_ADAPTERS - len(adapters)]:
            copy = Path(shutil.copytree(ADAPTERS / name, Path(scratch, name)))
            for config in copy.glob("*config.json"):
                fields = json.loads(config.read_text())
                fields.pop("base_model_name_or_path", None)
                config.write_text(json.dumps(fields))
            adapters.append(client.upload(copy, f"{name}-copy"))
    return adapters


def request(adapter: Adapter) -> pb.GenerateRequest:
    is_lora = adapter.kind == Adapter.LORA
    return pb.GenerateRequest(
        prompt="Once upon a time there was a fox who lived in a forest and",
        lora_id=adapter.id if is_lora else "",
        medusa_id="none" if is_lora else adapter.id,
        stop=pb.StopParams(max_new_tokens=64, ignore_eos=True),
    )


if __name__ == "__main__":
    typer.run(main)
