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
