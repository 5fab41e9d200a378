"""Does speculation change a token? Real weights, real prompts, mixed adapters, many rows at once.

Every request runs twice through gRPC: OFF, and AUTO beside the others of its group, with another
seed, LoRAs and heads each. Tokens and finish reasons are compared; what differs is shown with the
place. Without --prompts, those that come with the project are asked again and again.

    python -m benchmarks.identity
    python -m benchmarks.identity --prompts my.jsonl --count 256    # {"prompt"} or {"turns"} a line
    python -m benchmarks.identity --backend torch --dtype float32
"""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import report
from examples.local_server import local_server, upload_examples
from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb

PROMPTS = Path(__file__).parents[1] / "examples" / "prompts" / "chat.jsonl"
LORAS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("lora-gsm8k", 1.0),),
    (("lora-style", 1.0),),
    (("lora-gsm8k", 0.5), ("lora-style", 0.7)),
)
HEADS = ("heads-general", "heads-maths", "heads-code", "none")


def main(
    prompts: Annotated[Path, typer.Option(help="JSON lines of prompts.")] = PROMPTS,
    count: Annotated[int, typer.Option(help="Requests a temperature.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a request at most.")] = 64,
    temperatures: Annotated[list[float], typer.Option(help="Once for each.")] = [0.0, 0.8],  # noqa: B006
    rows: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    dtype: Annotated[str, typer.Option(help="The server's dtype.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="The server's backend.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads of the server.")] = 2,
) -> None:
    """Compare and print a table and a JSON line; exit code 1 if anything differs."""
    texts = list(itertools.islice(itertools.cycle(read(prompts)), count))
    options = ("--dtype", dtype, "--backend", backend, "--threads", str(threads))
    results = []
    with local_server(*options) as server, Client(server.address) as client:
        upload_examples(client)
        for temperature in temperatures:
            asked = [request(i, text, temperature, max_new_tokens) for i, text in enumerate(texts)]
            results.append({"temperature": temperature, **compare(client, asked, rows)})
    report(f"AUTO against OFF, {dtype}, backend {backend}", results, prompts=prompts.name)
    if any(row["mismatches"] for row in results):
        raise typer.Exit(1)


def read(path: Path) -> list[str]:
    """A prompt for each line; for a conversation its first turn."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["turns"][0] if "turns" in line else line["prompt"] for line in lines]


def request(number: int, text: str, temperature: float, max_new_tokens: int) -> pb.GenerateRequest:
    """`number` chooses LoRAs and heads, so that all pairs come in turn."""
    loras, heads = LORAS[number % len(LORAS)], HEADS[number // len(LORAS) % len(HEADS)]
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=text)]),
        loras=[pb.LoraRef(lora_id=lora_id, scale=scale) for lora_id, scale in loras],
        medusa_id=heads,
        sampling=pb.SamplingParams(temperature=temperature, seed=number),
        stop=pb.StopParams(max_new_tokens=max_new_tokens),
    )


def compare(client: Client, asked: list[pb.GenerateRequest], rows: int) -> dict[str, object]:
    """How many replies differ, and how much was drafted."""

    def run(mode: pb.Mode) -> list[pb.GenerateResponse]:
        requests = []
        for each in asked:
            requests.append(pb.GenerateRequest())
            requests[-1].CopyFrom(each)
            requests[-1].speculation.mode = mode
        with ThreadPoolExecutor(rows) as pool:
            return list(pool.map(client.generate, requests))

    off, auto = run(pb.OFF), run(pb.AUTO)
    mismatches = 0
    for number, (plain, drafted) in enumerate(zip(off, auto, strict=True)):
        same = list(plain.token_ids) == list(drafted.token_ids)
        if same and plain.finish_reason == drafted.finish_reason:
            continue
        mismatches += 1
        pairs = zip(plain.token_ids, drafted.token_ids, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), "the end")
        typer.echo(f"request {number} differs from token {place} on", err=True)
    stats = [reply.speculation for reply in auto]
    return {
        "requests": len(asked),
        "tokens": sum(len(reply.token_ids) for reply in auto),
        "drafted": sum(each.drafted_tokens for each in stats),
        "accepted": sum(each.accepted_tokens for each in stats),
        "mismatches": mismatches,
    }


if __name__ == "__main__":
    typer.run(main)
