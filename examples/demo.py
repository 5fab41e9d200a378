"""One batch, ten rows: no adapter, LoRAs, Medusa heads, both, a stack. `make demo` runs it.

Speculation must not change a token: every request runs again with it OFF, and the exit code is 1
unless all tokens are equal. Every run that is shown counts: the one in the dtype that the server
chooses by itself, and one in float32. bfloat16 is run where native kernels compute it: torch's own
matmuls change bits with the number of rows, so that a near-tie may flip.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
NOT_LOSSLESS = (
    "bfloat16 is left out: no native kernels run it here, and torch's matmuls change bits with the "
    "number of rows"
)


@dataclass(frozen=True, slots=True)
class Row:
    """One request. loras: (id, scale); heads: an id, "none", or "" for those of its bundle."""

    prompt: str
    loras: tuple[tuple[str, float], ...] = ()
    heads: str = "none"

    def request(self, mode: pb.Mode) -> pb.GenerateRequest:
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
    Row(TRAINS, loras=(("bundle-gsm8k", 1.0),), heads=""),
    Row(TRAINS, loras=(("lora-gsm8k", 1.0),), heads="private-gsm8k"),
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
    dtype, equal = run("auto", console)
    results = {dtype: equal}
    if dtype == "float32":
        console.print(NOT_LOSSLESS)
    else:
        results |= [run("float32", console)]
    counted = [dtype for dtype, equal in results.items() if equal is not None]
    different = [dtype for dtype, equal in results.items() if equal is False]
    console.print(
        f"[red]{' and '.join(different)}: speculation changed tokens[/]"
        if different
        else f"[green]{' and '.join(counted)}: every row's tokens are equal with speculation on "
        "and off[/]"
    )
    return 1 if different else 0


def run(wanted: str, console: Console) -> tuple[str, bool | None]:
    """The dtype, and True if AUTO and OFF gave every row the same tokens; None: it was not run."""

    def tell(line: str) -> None:
        console.print(" ", line.partition(": ")[2], highlight=False)

    console.print("starting a server; the first one ever fetches its model, 93 MB ...")
    with (
        local_server("--dtype", wanted, on_news=tell) as server,
        Client(server.address) as client,
    ):
        info = client.model_info()
        if info.dtype == "bfloat16" and info.backend == "torch":
            console.print(NOT_LOSSLESS)
            return info.dtype, None
        console.print("uploading the example adapters ...")
        adapters = upload_examples(client)
        console.print(
            f"[bold]{info.base_model}[/] in {info.dtype} on {info.device}, "
            f"backend {info.backend}; uploaded {', '.join(adapters)}"
        )
        drafted = generate_streamed(client, console)
        console.print("\nthe same requests with speculation OFF; done:", end="")
        plain = generate(client, pb.OFF, console)
    console.print(report(drafted, plain, info.dtype))
    pairs = zip(drafted, plain, strict=True)
    return info.dtype, all(one.token_ids == other.token_ids for one, other in pairs)


def generate(client: Client, mode: pb.Mode, console: Console) -> list[pb.GenerateResponse]:
    """All rows at once; counts them as they end."""
    with ThreadPoolExecutor(len(ROWS)) as pool:
        futures = [pool.submit(client.generate, row.request(mode)) for row in ROWS]
        for number, _ in enumerate(as_completed(futures), 1):
            console.print(f" {number}", end="")
        console.print()
    return [future.result() for future in futures]


def generate_streamed(client: Client, console: Console) -> list[pb.GenerateResponse]:
    """All rows at once, their text growing on screen."""
    replies = [pb.GenerateResponse() for _ in ROWS]

    def screen() -> Table:
        table = Table.grid(padding=(0, 1))
        for index, (row, reply) in enumerate(zip(ROWS, replies, strict=True)):
            names = "+".join(name for name, _ in row.loras) or "base"
            heads = row.heads or "its own"
            text = " ".join(reply.text.split())
            shown = text[-SHOWN:] if console.is_terminal else text[:SHOWN]
            table.add_row(
                str(index),
                f"[cyan]{names}[/]",
                f"[magenta]{heads}[/]",
                Text(shown),
            )
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
