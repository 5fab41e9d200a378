"""`lorastack train heads`: flags to a HeadsRun, then its stages one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorastack.cli.choices import Backend, Device, DType
from lorastack.cli.inputs import lora_ref
from lorastack.cli.options import (
    INT32,
    UINT64,
    BackendOption,
    BaseName,
    DeviceOption,
    DTypeOption,
    Isa,
    Json,
    KvMemory,
    MaxContext,
    MaxRows,
    Model,
    QuantizeOption,
    Server,
    Store,
    Threads,
    default_store,
    path,
)
from lorastack.cli.output import print_json, progress_bar, stage_bars, stage_log, startup_bars
from lorastack.client import DEFAULT_SERVER
from lorastack.config import ModelConfig, parse_size, share_cores
from lorastack.printable import one_line

if TYPE_CHECKING:  # it imports torch
    from lorastack.train.progress import Progress

train = typer.Typer(help="Train Medusa heads for a base model or a LoRA, and measure them.")


@train.callback(invoke_without_command=True)
def top(context: typer.Context) -> None:
    """Train Medusa heads for a base model or a LoRA, and measure them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


Lora = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="ID[:SCALE]",
        help="For this LoRA of the store, or alias; repeat it for a stack.",
        show_default="the base model alone",
    ),
]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=2, max=INT32, metavar="N", help="Tokens of an answer at most."
    ),
]


@train.command()
def heads(
    prompts: Annotated[
        Path,
        typer.Option(
            "--prompts",
            metavar="FILE",
            parser=path,
            help='JSON lines of prompts: ShareGPT, OpenAI messages, Alpaca, or {"prompt": ...}.',
            show_default=False,
        ),
    ],
    adapter_id: Annotated[
        str,
        typer.Option(
            "--id", metavar="ID", help="[namespace/]name of the result.", show_default=False
        ),
    ],
    lora: Lora = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            parser=path,
            help="Everything of the run; the same command goes on with what is there.",
            show_default="lorastack-train/ID",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an earlier run left in --work.")
    ] = False,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="One folder with the LoRA's own files and its heads."),
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0, max=100, metavar="T", help="Of the answers; 0 is greedy."
        ),
    ] = 0.0,
    num_heads: Annotated[
        int, typer.Option("--num-heads", min=1, max=MOST_HEADS, metavar="N", help="Heads.")
    ] = 4,
    num_layers: Annotated[
        int,
        typer.Option("--num-layers", min=1, max=MOST_HEADS, metavar="N", help="Blocks of a head."),
    ] = 1,
    draft_vocabulary: Annotated[
        int,
        typer.Option(
            "--draft-vocabulary",
            min=0,
            max=INT32,
            metavar="N",
            help="Tokens that heads choose from, the most frequent ones; 0: all.",
        ),
    ] = 4096,
    soft_targets: Annotated[
        int,
        typer.Option(
            "--soft-targets",
            min=0,
            max=MOST_TOP,
            metavar="N",
            help="Learn from so many of the model's likeliest tokens too.",
        ),
    ] = 0,
    continue_from: Annotated[
        str,
        typer.Option(
            "--continue-from", metavar="ID|DIR", help="Begin with these heads.", show_default=False
        ),
    ] = "",
    shared: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="ID|DIR",
            help="Keep these heads as they are and learn a private part of --private-rank.",
            show_default=False,
        ),
    ] = "",
    private_rank: Annotated[
        int,
        typer.Option(
            "--private-rank", min=0, max=MOST_RANK, metavar="R", help="Rank of the private part."
        ),
    ] = 0,
    epochs: Annotated[
        int,
        typer.Option("--epochs", min=1, max=INT32, metavar="N", help="Passes over the answers."),
    ] = 6,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", min=1, max=INT32, metavar="N", help="Tokens that a step learns from."
        ),
    ] = 2048,
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", min=0, max=1, metavar="RATE", help="The greatest one."),
    ] = 1e-3,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out",
            min=0,
            max=0.5,
            metavar="SHARE",
            help="Of the prompts: to measure with, and to stop in time.",
        ),
    ] = 0.05,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=INT32, metavar="N", help="Of everything drawn.")
    ] = 0,
    upload: Annotated[
        bool, typer.Option("--upload", help="Store the result under --id at --server.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Upload although the id exists: a new revision.")
    ] = False,
    server: Server = DEFAULT_SERVER,
    model: Model = None,
    base_name: BaseName = None,
    store: Store = None,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    backend: BackendOption = Backend.AUTO,
    isa: Isa = None,
    quantize: QuantizeOption = None,
    threads: Threads = None,
    kv_memory: KvMemory = None,
    max_rows: MaxRows = None,
    max_context: MaxContext = None,
    as_json: Json = False,
) -> None:
    """Train heads that speed up a model or a LoRA on prompts like these.

    The model answers the prompts itself, through the engine that serves; heads learn to guess its
    answers, are measured on prompts that were held out, and written as a folder to upload.
    """
