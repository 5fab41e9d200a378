"""What the commands of `lorastack train` share: options, and what becomes of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorastack.adapters.store.ids import flat_name
from lorastack.cli.inputs import lora_ref
from lorastack.cli.options import INT32, path
from lorastack.config import share_cores

# Options that change nothing of the result: the model card's command goes without them.
_INCIDENTAL = frozenset(
    (
        *("work", "restart", "upload", "replace", "server", "store", "as_json"),
        *("threads", "kv_memory", "max_rows"),
    )
)


def positive(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter("it is not a number above 0")
    return value


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
Prompts = Annotated[
    Path,
    typer.Option(
        "--prompts",
        metavar="FILE",
        parser=path,
        help='JSON lines of prompts: ShareGPT, OpenAI messages, Alpaca, or {"prompt": ...}.',
        show_default=False,
    ),
]
AdapterId = Annotated[
    str,
    typer.Option("--id", metavar="ID", help="[namespace/]name of the result.", show_default=False),
]
Work = Annotated[
    Path | None,
    typer.Option(
        "--work",
        metavar="DIR",
        parser=path,
        help="Everything of the run; the same command goes on with what is there.",
        show_default="lorastack-train/ID",
    ),
]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Throw away what an earlier run left in --work, but answers that would be the same.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0,
        max=100,
        metavar="T",
        help="Of the answers; 0 is greedy.",
    ),
]
NumHeads = Annotated[
    int | None,
    typer.Option("--num-heads", min=1, max=INT32, metavar="N", help="Heads.", show_default="4"),
]
NumLayers = Annotated[
    int | None,
    typer.Option(
        "--num-layers",
        min=1,
        max=INT32,
        metavar="N",
        help="Blocks of a head.",
        show_default="1",
    ),
]
DraftVocabulary = Annotated[
    int,
    typer.Option(
        "--draft-vocabulary",
        min=0,
        max=INT32,
        metavar="N",
        help="Tokens that heads choose from, the most frequent ones; 0: all, or those of the heads "
        "that are corrected.",
    ),
]
ContinueFrom = Annotated[
    str,
    typer.Option(
        "--continue-from", metavar="ID|DIR", help="Begin with these heads.", show_default=False
    ),
]
Epochs = Annotated[
    int,
    typer.Option("--epochs", min=1, max=INT32, metavar="N", help="Passes over the answers."),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", min=1, max=INT32, metavar="N", help="Tokens that a step learns from."
    ),
]


def _learning_rate(**more: Any) -> Any:
    return typer.Option(
        "--learning-rate",
        max=1,
        metavar="RATE",
        callback=positive,
        help="Of most steps; it rises to this and falls again.",
        **more,
    )


LearningRate = Annotated[float, _learning_rate()]
LearningRateByKind = Annotated[
    float | None, _learning_rate(show_default="0.001; of a private part 0.01")
]
HeldOut = Annotated[
    float,
    typer.Option(
        "--held-out",
        min=0,
        max=0.5,
        metavar="SHARE",
        help="Of the prompts: to measure with, and to stop in time.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=INT32, metavar="N", help="Of everything drawn.")
]
Upload = Annotated[bool, typer.Option("--upload", help="Store the result under --id at --server.")]
Replace = Annotated[
    bool, typer.Option("--replace", help="Upload although the id exists: a new revision.")
]


def work_folder(work: Path | None, adapter_id: str) -> Path:
    """Where a run is kept. Raises BadParameter for an id that no folder can have."""
    if "\0" in adapter_id:
        raise typer.BadParameter("it holds a NUL character", param_hint="--id")
    return work or Path("lorastack-train", flat_name(adapter_id))


def destination(server: str, *, upload: bool, replace: bool) -> str:
    """Where the result is uploaded to; "" for nowhere."""
    if replace and not upload:
        raise typer.BadParameter("it goes with --upload", param_hint="--replace")
    return server if upload else ""


def prepare() -> None:
    """What must be set before torch and the hub's library are imported."""
    share_cores()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def lora_pairs(texts: list[str] | None) -> tuple[tuple[str, float], ...]:
    refs = [lora_ref(text) for text in texts or ()]
    return tuple((ref.lora_id, ref.scale if ref.HasField("scale") else 1.0) for ref in refs)


def command_line(context: typer.Context) -> tuple[str, ...]:
    """The command line as given, without what changes nothing of the result."""
    words = ["lorastack", "train", context.command.name or ""]
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
