"""`lorastack train joint`: flags to a HeadsRun whose LoRA learns too."""

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
    LearningRate,
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
    positive,
    prepare,
    work_folder,
)
from lorastack.client import DEFAULT_SERVER

MAX_LORA_RANK = 256


def train_joint(
    context: typer.Context,
    prompts: Prompts,
    adapter_id: AdapterId,
    rank: Annotated[
        int,
        typer.Option(
            "--rank", min=1, max=MAX_LORA_RANK, metavar="R", help="Of the LoRA; its scale is 1."
        ),
    ] = 16,
    work: Work = None,
    restart: Restart = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    num_heads: NumHeads = None,
    num_layers: NumLayers = None,
    draft_vocabulary: DraftVocabulary = 4096,
    continue_from: ContinueFrom = "",
    epochs: Epochs = 3,
    batch_size: BatchSize = 2048,
    learning_rate: LearningRate = 1e-3,
    lora_learning_rate: Annotated[
        float,
        typer.Option(
            "--lora-learning-rate",
            max=1,
            metavar="RATE",
            callback=positive,
            help="As --learning-rate, which is the heads', of the LoRA.",
        ),
    ] = 1e-4,
    heads_weight: Annotated[
        float,
        typer.Option(
            "--heads-weight",
            min=0,
            max=1000,
            metavar="W",
            help="What the LoRA gives for better guesses; less keeps it nearer to the base.",
        ),
    ] = 0.01,
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
    threads: Threads = None,
    kv_memory: LocalKvMemory = None,
    max_rows: MaxRows = None,
    max_context: MaxContext = None,
    as_json: Json = False,
) -> None:
    """Train a LoRA and heads together, so that the model's text is easier to guess.

    The LoRA stays near to the base model, which answers the prompts first; how near is measured.
    The result is a bundle of both. It needs PEFT: pip install 'lorastack[train]'.
    """
    folder = work_folder(work, adapter_id)
    goal = destination(server, upload=upload, replace=replace)
    prepare()
    # Deferred: `--help` must not wait for torch.
    from lorastack.cli.machine import machine
    from lorastack.cli.trained import carry_out
    from lorastack.request import SamplingParams
    from lorastack.train.distill import DistillOptions
    from lorastack.train.joint_options import JointOptions
    from lorastack.train.options import TrainOptions
    from lorastack.train.run import HeadsRun
    from lorastack.train.start import StartOptions

    here = machine(
        model=model,
        base_names=base_name,
        store=store,
        needs_store=bool(continue_from) and not Path(continue_from).is_dir(),
        device=device,
        dtype=dtype,
        backend=backend,
        isa=isa,
        quantize=None,
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
        start=StartOptions(num_heads=num_heads, num_layers=num_layers, continue_from=continue_from),
        distill=DistillOptions(
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(temperature=temperature, seed=seed),
        ),
        training=TrainOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            held_out=held_out,
            seed=seed,
        ),
        joint=JointOptions(rank=rank, learning_rate=lora_learning_rate, heads_weight=heads_weight),
        draft_vocabulary=draft_vocabulary,
        restart=restart,
        command=command_line(context),
    )
    carry_out(run, goal, replace=replace, as_json=as_json)
