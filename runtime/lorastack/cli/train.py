"""`lorastack train`: flags to a HeadsRun or an EvalRun, which run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.choices import Backend, Device, DType
from lorastack.cli.options import (
    BackendOption,
    BaseName,
    DeviceOption,
    DTypeOption,
    Isa,
    Json,
    LocalKvMemory,
    MaxContext,
    MaxRows,
    Model,
    QuantizeOption,
    Server,
    Store,
    Threads,
)
from lorastack.cli.training import (
    AdapterId,
    BatchSize,
    ContinueFrom,
    DraftVocabulary,
    Epochs,
    HeldOut,
    LearningRateByKind,
    Lora,
    MaxNewTokens,
    NumHeads,
    NumLayers,
    Prompts,
    Replace,
    Restart,
    Seed,
    Temperature,
    Upload,
    Work,
    command_line,
    destination,
    lora_pairs,
    prepare,
    work_folder,
)
from lorastack.client import DEFAULT_SERVER
from lorastack.layout import MAX_PRIVATE_RANK

MOST_TOP = 1024
train = typer.Typer(help="Train Medusa heads for a base model or a LoRA, and measure them.")


@train.callback(invoke_without_command=True)
def top(context: typer.Context) -> None:
    """Train Medusa heads for a base model or a LoRA, and measure them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@train.command()
def heads(
    context: typer.Context,
    prompts: Prompts,
    adapter_id: AdapterId,
    lora: Lora = None,
    work: Work = None,
    restart: Restart = False,
    bundle: Annotated[
        bool,
        typer.Option("--bundle", help="One folder with the LoRA's own files and its heads."),
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    num_heads: NumHeads = None,
    num_layers: NumLayers = None,
    draft_vocabulary: DraftVocabulary = 4096,
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
    continue_from: ContinueFrom = "",
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
    epochs: Epochs = 6,
    batch_size: BatchSize = 2048,
    learning_rate: LearningRateByKind = None,
    held_out: HeldOut = 0.05,
    seed: Seed = 0,
    upload: Upload = False,
    replace: Replace = False,
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
    kv_memory: LocalKvMemory = None,
    max_rows: MaxRows = None,
    max_context: MaxContext = None,
    as_json: Json = False,
) -> None:
    """Train heads that speed up a model or a LoRA on prompts like these.

    The model answers the prompts itself, through the engine that serves; heads learn to guess its
    answers, are measured on prompts that were held out, and written as a folder to upload.
    """
    folder = work_folder(work, adapter_id)
    goal = destination(server, upload=upload, replace=replace)
    prepare()
    # Deferred: `--help` must not wait for torch.
    from lorastack.cli.machine import machine
    from lorastack.cli.trained import carry_out
    from lorastack.request import SamplingParams
    from lorastack.train.distill import DistillOptions
    from lorastack.train.options import LEARNING_RATE, PRIVATE_LEARNING_RATE, TrainOptions
    from lorastack.train.run import HeadsRun
    from lorastack.train.start import StartOptions

    loras = lora_pairs(lora)
    if learning_rate is None:
        learning_rate = PRIVATE_LEARNING_RATE if shared else LEARNING_RATE
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
        command=command_line(context),
    )
    carry_out(run, goal, replace=replace, as_json=as_json)
