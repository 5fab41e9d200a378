"""`lorastack train`: flags to a HeadsRun or an EvalRun, which run in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.choices import Backend, Device, DType
from lorastack.cli.inputs import lora_ref
from lorastack.cli.options import (
    INT32,
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
    path,
)
from lorastack.client import DEFAULT_SERVER
from lorastack.config import share_cores
from lorastack.layout import MAX_PRIVATE_RANK

MOST_TOP = 1024
# Options that change nothing of the result: the model card's command goes without them.
_INCIDENTAL = frozenset(
    (
        *("work", "restart", "upload", "replace", "server", "store", "as_json"),
        *("threads", "kv_memory", "max_rows"),
    )
)

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


def _positive(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter("it is not a number above 0")
    return value


@train.command()
def heads(
    context: typer.Context,
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
            "--temperature",
            min=0,
            max=100,
            metavar="T",
            help="Of the answers; 0 is greedy.",
        ),
    ] = 0.0,
    num_heads: Annotated[
        int | None,
        typer.Option("--num-heads", min=1, max=INT32, metavar="N", help="Heads.", show_default="4"),
    ] = None,
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--num-layers",
            min=1,
            max=INT32,
            metavar="N",
            help="Blocks of a head.",
            show_default="1",
        ),
    ] = None,
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
        int | None,
        typer.Option(
            "--private-rank",
            min=1,
            max=MAX_PRIVATE_RANK,
            metavar="R",
            help="Rank of the private part; goes with --from.",
            show_default="16",
        ),
    ] = None,
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
        typer.Option(
            "--learning-rate",
            max=1,
            metavar="RATE",
            callback=_positive,
            help="Of most steps; it rises to this and falls again.",
        ),
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
    folder = work or Path("lorastack-train", *adapter_id.split("/"))
    if "\0" in adapter_id:
        raise typer.BadParameter("it holds a NUL character", param_hint="--id")
    if replace and not upload:
        raise typer.BadParameter("it goes with --upload", param_hint="--replace")
    prepare()
    # Deferred: `--help` must not wait for torch.
    from lorastack.cli.machine import machine, watching
    from lorastack.cli.trained import show_outcome
    from lorastack.request import SamplingParams
    from lorastack.train.distill import DistillOptions
    from lorastack.train.options import TrainOptions
    from lorastack.train.pipeline import make_heads
    from lorastack.train.publish import Publication
    from lorastack.train.run import HeadsRun
    from lorastack.train.start import StartOptions

    loras = lora_pairs(lora)
    named = [name for name in (continue_from, shared) if name and not Path(name).is_dir()]
    here = machine(
        model=model,
        base_names=base_name,
        store=store,
        needs_store=bool(loras or named),
        device=device,
        dtype=dtype,
        backend=backend,
        isa=isa,
        quantize=quantize,
        threads=threads,
        kv_memory=kv_memory,
        max_rows=max_rows,
        max_context=max_context,
    )
    run = HeadsRun(
        adapter_id=adapter_id,
        prompts=prompts,
        work=folder,
        model=here.model,
        engine=here.engine,
        adapters=here.adapters,
        loras=loras,
        start=StartOptions(
            num_heads=num_heads,
            num_layers=num_layers,
            continue_from=continue_from,
            shared=shared,
            private_rank=private_rank,
        ),
        distill=DistillOptions(
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(temperature=temperature, seed=seed),
            num_top=soft_targets,
        ),
        training=TrainOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            held_out=held_out,
            soft_targets=soft_targets > 0,
            seed=seed,
        ),
        draft_vocabulary=draft_vocabulary,
        bundle=bundle,
        restart=restart,
        command=_command(context),
    )
    publication = Publication(server, adapter_id, replace=replace) if upload else None
    try:
        with watching() as (loading, progress):
            outcome = make_heads(run, publication=publication, progress=progress, loading=loading)
    except KeyboardInterrupt:
        again = "the same command without --restart" if restart else "the same command"
        typer.echo(f"interrupted: {again} goes on with what is in {folder}", err=True)
        raise
    show_outcome(outcome, server if upload else "", as_json)


def prepare() -> None:
    """What must be set before torch and the hub's library are imported."""
    share_cores()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def lora_pairs(texts: list[str] | None) -> tuple[tuple[str, float], ...]:
    refs = [lora_ref(text) for text in texts or ()]
    return tuple((ref.lora_id, ref.scale if ref.HasField("scale") else 1.0) for ref in refs)


def _command(context: typer.Context) -> tuple[str, ...]:
    """The command line as given, without what changes nothing of the result."""
    words = ["lorastack", "train", "heads"]
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in _INCIDENTAL or source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        for each in value if isinstance(value, list) else [value]:
            words.append(parameter.opts[0])
            if not isinstance(each, bool):
                words.append(str(getattr(each, "value", each)))
    return tuple(words)
