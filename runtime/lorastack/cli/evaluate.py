"""`lorastack train eval`: flags to an EvalRun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.choices import Backend, Device, DType
from lorastack.cli.options import (
    INT32,
    BackendOption,
    BaseName,
    DeviceOption,
    DTypeOption,
    Isa,
    Json,
    LocalKvMemory,
    MaxContext,
    Model,
    QuantizeOption,
    Store,
    Threads,
    path,
)
from lorastack.cli.training import Lora, MaxNewTokens, lora_pairs, prepare


def evaluate_heads(
    heads: Annotated[
        list[str],
        typer.Option(
            "--heads",
            metavar="ID|DIR",
            help="Heads of the store, or a folder of heads. May be repeated.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        list[Path],
        typer.Option(
            "--prompts",
            metavar="FILE",
            parser=path,
            help="JSON lines of prompts, as for `train heads`. May be repeated.",
            show_default=False,
        ),
    ],
    lora: Lora = None,
    num_prompts: Annotated[
        int,
        typer.Option(
            "--num-prompts",
            min=1,
            max=INT32,
            metavar="N",
            help="Of each file at most, spread over it.",
        ),
    ] = 32,
    max_new_tokens: MaxNewTokens = 128,
    write_prior: Annotated[
        bool,
        typer.Option(
            "--write-prior",
            help="Write into each folder what serving taught: adaptive trees start from it.",
        ),
    ] = False,
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
    max_context: MaxContext = None,
    as_json: Json = False,
) -> None:
    """Measure heads on prompts: their guesses, and tokens a step and speed as they are served.

    Every prompt is answered greedily, one row at a time, without drafts and with each of the heads.
    """
    prepare()
    # Deferred: `--help` must not wait for torch.
    from lorastack.cli.machine import machine, watching
    from lorastack.cli.trained import show_evaluation
    from lorastack.train.evaluate import EvalRun, evaluate

    loras = lora_pairs(lora)
    here = machine(
        model=model,
        base_names=base_name,
        store=store,
        needs_store=bool(loras) or not all(Path(name).is_dir() for name in heads),
        device=device,
        dtype=dtype,
        backend=backend,
        isa=isa,
        quantize=quantize,
        threads=threads,
        kv_memory=kv_memory,
        max_rows=None,
        max_context=max_context,
    )
    run = EvalRun(
        heads=tuple(dict.fromkeys(heads)),
        prompts=tuple(dict.fromkeys(prompts)),
        model=here.model,
        engine=here.engine,
        adapters=here.adapters,
        loras=loras,
        max_new_tokens=max_new_tokens,
        num_prompts=num_prompts,
        write_prior=write_prior,
    )
    with watching() as (loading, progress):
        evaluation = evaluate(run, progress=progress, loading=loading)
    show_evaluation(evaluation, as_json)
