"""`lorastack bench`: how fast is a running server, seen by its clients?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import count, cycle, islice
from typing import Annotated, Any, Literal

import typer

from lorastack.cli.inputs import read_text
from lorastack.cli.options import UINT32, Json, Server
from lorastack.cli.output import print_json, print_table
from lorastack.client import (
    DEFAULT_SERVER,
    OFF,
    ChatMessage,
    ChatMessages,
    Client,
    GenerateRequest,
    GetModelInfoResponse,
    Speculation,
    StopParams,
    TokenIds,
    TokenizeRequest,
)
from lorastack.client.traffic import Outcome, percentile, send
from lorastack.errors import InvalidArgumentError
from lorastack.printable import one_line

FILLER = "The quick brown fox jumps over the lazy dog while the clock on the old tower strikes."
HEADINGS = (
    "at once", "requests", "tokens/s", "first ms", "first p99", "gap ms", "gap p99", "tokens/step"
)  # fmt: skip

MOST_REQUESTS, MOST_AT_ONCE = 100_000, 4_096
# Fields of GetModelInfo that --json shows.
MEASURED = ("base_model", "device", "backend", "dtype", "quantization", "threads", "version")


def bench(
    concurrency: Annotated[
        str, typer.Option("--concurrency", metavar="N,N,...", help="Requests at once, in turn.")
    ] = "1,8,32",
    requests: Annotated[
        int,
        typer.Option(
            "--requests",
            min=1,
            max=MOST_REQUESTS,
            metavar="N",
            help="Requests for each concurrency; at least as many as run at once.",
        ),
    ] = 32,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens", min=1, max=UINT32, metavar="N", help="Length of made-up prompts."
        ),
    ] = 64,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='JSON lines {"prompt": ...} instead, sent as user messages (chat template).',
        ),
    ] = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            min=1,
            max=UINT32,
            metavar="N",
            help="Tokens that every request makes.",
        ),
    ] = 64,
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="ID", help="Requests take them in turn; repeatable."),
    ] = None,
    medusa: Annotated[str, typer.Option("--medusa", metavar="ID", help="Medusa heads.")] = "",
    speculation: Annotated[
        Literal["auto", "off"], typer.Option("--speculation", help="off: one token a step.")
    ] = "auto",
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Measure a running server.

    Tokens a second, milliseconds to the first token and between tokens: median and p99. One
    request warms the server up and does not count.
    """
    levels = _levels(concurrency)
    template = GenerateRequest(
        medusa_id=medusa,
        speculation=Speculation(mode=OFF if speculation == "off" else None),
        stop=StopParams(max_new_tokens=max_new_tokens, ignore_eos=True),
    )
    rows: list[dict[str, Any]] = []
    with Client(server) as client:
        info = client.model_info()
        if not prompts and prompt_tokens >= info.limits.max_context:
            raise InvalidArgumentError(
                f"--prompt-tokens must be below the context of {info.limits.max_context}"
            )
        inputs = _read(prompts) if prompts else _made_up(client, prompt_tokens)
        stream = _requests(template, inputs, lora or [""])
        send(client, list(islice(stream, 1)), 1)  # the first request after a start is slower
        for level in levels:
            batch = list(islice(stream, max(requests, level)))
            rows.append(summarise(level, send(client, batch, level)))
    if as_json:
        measured = {name: getattr(info, name) for name in MEASURED}
        print_json({"server": server, **measured, "rows": rows})
    else:
        typer.echo(f"{_what(info)}, after one request to warm up\n")
        print_table(HEADINGS, [list(row.values()) for row in rows])


def _what(info: GetModelInfoResponse) -> str:
    """The model and what runs it."""
    dtype = info.quantization or info.dtype
    threads = f", {info.threads} threads" if info.threads else ""
    return one_line(
        f"{info.base_model} in {dtype} on {info.device}, backend {info.backend}{threads}"
    )


def summarise(concurrency: int, outcomes: list[Outcome]) -> dict[str, Any]:
    """The table's row for one concurrency; times in milliseconds."""
    seconds = max(o.ended for o in outcomes) - min(o.sent for o in outcomes)
    waits = [1000 * outcome.first_token for outcome in outcomes]
    gaps = [1000 * gap for outcome in outcomes for gap in outcome.gaps] or [0.0]
    tokens, steps = sum(o.tokens for o in outcomes), sum(o.steps for o in outcomes)
    return {
        "concurrency": concurrency,
        "requests": len(outcomes),
        "tokens_per_second": round(tokens / seconds, 1),
        "first_token_ms_median": round(statistics.median(waits), 1),
        "first_token_ms_p99": round(percentile(waits, 0.99), 1),
        "gap_ms_median": round(statistics.median(gaps), 2),
        "gap_ms_p99": round(percentile(gaps, 0.99), 2),
        # The prompt's own step gave the first token.
        "tokens_per_step": round((tokens - len(outcomes)) / steps, 2) if steps else 0.0,
    }


def _levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
        if min(levels) > 0 and max(levels) <= MOST_AT_ONCE:
            return levels
    except ValueError:
        pass
    raise typer.BadParameter(
        f"{text!r} is not a list such as 1,8,32, of at most {MOST_AT_ONCE} at once",
        param_hint="--concurrency",
    )


def _requests(
    template: GenerateRequest, inputs: Iterator[GenerateRequest], loras: list[str]
) -> Iterator[GenerateRequest]:
    for request, lora_id in zip(inputs, cycle(loras), strict=False):
        request.MergeFrom(template)
        request.lora_id = lora_id
        yield request


def _made_up(client: Client, num_tokens: int) -> Iterator[GenerateRequest]:
    """Yields prompts of `num_tokens` tokens; each has its own start, so no cached prefix helps."""
    for number in count():
        text = f"{number}. {' '.join([FILLER] * (num_tokens // 10 + 1))}"  # FILLER has 17 words
        ids = client.tokenize(TokenizeRequest(prompt=text))[:num_tokens]
        yield GenerateRequest(token_ids=TokenIds(ids=ids))


def _read(path: str) -> Iterator[GenerateRequest]:
    """Repeats a file's prompts without end."""
    lines = read_text(path, "--prompts").splitlines()
    try:
        prompts = [json.loads(line)["prompt"] for line in lines]
        messages = [ChatMessages(messages=[ChatMessage(role="user", content=p)]) for p in prompts]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise typer.BadParameter(
            f'{path} has a line that is not {{"prompt": "text"}} ({error!r})',
            param_hint="--prompts",
        ) from error
    if not messages:
        raise typer.BadParameter(f"{path} is empty", param_hint="--prompts")
    return (GenerateRequest(chat=chat) for chat in cycle(messages))
