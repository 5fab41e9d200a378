"""One batch, ten rows: no adapter, LoRAs, Medusa heads, both, a stack. `make demo` runs it.

Speculation must not change a token: every request runs again with it OFF, and the exit code is 1
unless all tokens are equal. The check runs in float32. In bfloat16 torch's matmuls change bits with
the number of rows, so a near-tie may flip there: such rows are shown with the gap of the two best
logits, and do not count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.local_server import local_server, upload_examples
from lorastack.client import Client
from lorastack.v1 import generation_pb2 as pb

MAX_NEW_TOKENS = 96
SHOWN = 72  # characters of a row's text on screen
FILE_WIDTH = 140  # characters a line when the output is no terminal
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Row:
    """One request. loras: (id, scale); heads: an id or "none"."""

    prompt: str
    loras: tuple[tuple[str, float], ...] = ()
    heads: str = "none"

    def request(self, mode: pb.Mode.ValueType) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=self.prompt)]),
            loras=[pb.LoraRef(lora_id=name, scale=scale) for name, scale in self.loras],
            medusa_id=self.heads,
            speculation=pb.Speculation(mode=mode),
            stop=pb.StopParams(max_new_tokens=MAX_NEW_TOKENS),
            output=pb.OutputParams(logprobs=True, top_logprobs=2),
        )


TRAINS = "A train travels 60 miles in the first hour and 75 in the second. How far in all?"
ROWS = (
    Row("Write a haiku about autumn leaves."),
    Row("Explain in simple words why the sky is blue.", heads="heads-general"),
    Row("A baker makes 14 trays of 12 rolls and sells 97. How many are left?", heads="heads-maths"),
    Row("Write a Python function that reverses a string.", heads="heads-code"),
    Row(TRAINS, loras=(("lora-gsm8k", 1.0),)),
    Row(TRAINS, loras=(("lora-gsm8k", 1.0),), heads="heads-maths"),
    Row("Give me three tips for sleeping better.", loras=(("lora-style", 1.0),)),
    Row("What is the capital of France?", loras=(("lora-style", 1.0),), heads="heads-general"),
    Row(TRAINS, loras=(("lora-gsm8k", 1.0), ("lora-style", 0.5)), heads="heads-maths"),
    Row("Name four planets of the solar system.", loras=(("lora-style", 0.5),), heads="heads-code"),
)


def main() -> int:
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print("[bold]lorastack demo[/]: ten requests in one batch, then again without drafts\n")
    different = [dtype for dtype in DTYPES if not run(dtype, console)]
    console.print(
        f"[red]{' and '.join(different)}: speculation changed tokens[/]"
        if different
        else "[green]every row's tokens are equal with speculation on and off[/]"
    )
    return 1 if different else 0


def run(dtype: str, console: Console) -> bool:
    """Whether AUTO and OFF gave every row the same tokens.

    Without native kernels bfloat16 does not count: torch's matmuls change bits with the rows.
    """
    console.print(f"starting a server in {dtype} ...")
    with local_server("--dtype", dtype) as server, Client(server.address) as client:
        adapters = upload_examples(client)
        info = client.model_info()
        console.print(
            f"[bold]{info.base_model}[/] in {info.dtype} on {info.device}, "
            f"backend {info.backend}; uploaded {', '.join(adapters)}"
        )
        drafted = generate_streamed(client, console)
        console.print("\nthe same requests with speculation OFF ...")
        plain = generate(client, pb.OFF)
    console.print(report(drafted, plain, dtype))
    if dtype == "bfloat16" and info.backend == "torch":
        console.print("bfloat16 in plain torch: near-ties may flip; float32 is what counts")
        return True
    return all(a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True))


def generate(client: Client, mode: pb.Mode.ValueType) -> list[pb.GenerateResponse]:
    with ThreadPoolExecutor(len(ROWS)) as pool:
        return list(pool.map(lambda row: client.generate(row.request(mode)), ROWS))


def generate_streamed(client: Client, console: Console) -> list[pb.GenerateResponse]:
    """All rows at once, their text growing on screen."""
    replies = [pb.GenerateResponse() for _ in ROWS]

    def screen() -> Table:
        table = Table.grid(padding=(0, 1))
        for index, (row, reply) in enumerate(zip(ROWS, replies, strict=True)):
            names = "+".join(name for name, _ in row.loras) or "base"
            text = " ".join(reply.text.split())
            shown = text[-SHOWN:] if console.is_terminal else text[:SHOWN]
            table.add_row(str(index), f"[cyan]{names}[/]", f"[magenta]{row.heads}[/]", Text(shown))
        return table

    def follow(index: int) -> None:
        reply = replies[index]
        for part in client.stream(ROWS[index].request(pb.AUTO)):
            reply.text += part.text
            reply.token_ids.extend(part.token_ids)
            reply.tokens.extend(part.tokens)
            reply.MergeFrom(part.final)

    with (
        Live(get_renderable=screen, console=console, refresh_per_second=8, transient=False),
        ThreadPoolExecutor(len(ROWS)) as pool,
    ):
        list(pool.map(follow, range(len(ROWS))))
    return replies


def report(
    drafted: Sequence[pb.GenerateResponse], plain: Sequence[pb.GenerateResponse], dtype: str
) -> Table:
    """Which adapters ran, what the drafts gave, and whether the tokens are equal."""
    table = Table(title=f"{dtype}: AUTO against OFF", title_justify="left", box=box.SIMPLE_HEAD)
    headings = ("row", "LoRA (digest)", "heads (digest)", "tokens", "a step", "accepted by head")
    for heading in (*headings, "equal"):
        table.add_column(heading, no_wrap=True)
    for index, (auto, off) in enumerate(zip(drafted, plain, strict=True)):
        stats = auto.speculation
        by_head = [count / max(stats.steps, 1) for count in stats.accepted_by_head]
        table.add_row(
            str(index),
            "\n".join(
                f"{use.scale:g} x {use.lora_id} ({short(use.digest)})"
                for use in auto.adapters.loras
            )
            or "-",
            f"{auto.adapters.medusa_id} ({short(auto.adapters.medusa_digest)})"
            if auto.adapters.medusa_id
            else "-",
            str(auto.usage.generated_tokens),
            f"{(auto.usage.generated_tokens - 1) / max(stats.steps, 1):.2f}",
            " ".join(f"{share:.2f}" for share in by_head) or "-",
            compare(auto, off),
        )
    return table


def compare(auto: pb.GenerateResponse, off: pb.GenerateResponse) -> str:
    """ "yes", or where the tokens part and how close the two best logits were there."""
    if auto.token_ids == off.token_ids:
        return "yes"
    pairs = zip(auto.token_ids, off.token_ids, strict=False)
    index = next(i for i, (one, other) in enumerate(pairs) if one != other)
    best, second = off.tokens[index].top[:2]
    return f"no: token {index}, gap {best.logprob - second.logprob:.3f}"


def short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:8]


if __name__ == "__main__":
    sys.exit(main())
