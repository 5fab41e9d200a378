"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lorastack.cli.choices import Backend, Device, DType, Quantize
from lorastack.client import check_server
from lorastack.config import parse_size
from lorastack.errors import InvalidArgumentError


def _server(text: str) -> str:
    try:
        check_server(text)
    except InvalidArgumentError as error:
        raise typer.BadParameter(error.message) from None
    return text


def not_empty(text: str | None) -> str | None:
    """Option callback: refuses "", which is mostly an unset shell variable."""
    if text == "":
        raise typer.BadParameter("it is empty; leave the option out for its default")
    return text


def path(text: str) -> Path:
    """Option parser: refuses "", as `Path("")` would be the current folder."""
    if not text or "\0" in text:
        raise typer.BadParameter("it is empty, or no path (. is the current folder)")
    return Path(text)


Host = Annotated[
    str,
    typer.Option(
        "--host",
        metavar="ADDRESS",
        callback=not_empty,
        envvar="LORASTACK_HOST",
        help="Listen there; whoever reaches it may do everything, see docs/security.md.",
    ),
]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        callback=_server,
        envvar="LORASTACK_SERVER",
        help="Which server.",
    ),
]
INT32 = (1 << 31) - 1
UINT32, UINT64 = (1 << 32) - 1, (1 << 64) - 1  # the largest of the API's numbers
MOST_THREADS = 1024

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
IfDigest = Annotated[
    str | None,
    typer.Option(
        "--if-digest",
        metavar="DIGEST",
        help="Only if the id points there; empty: only if the id is new.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH|HUB_ID",
        callback=not_empty,
        envvar="LORASTACK_MODEL",
        help="Base model; without it the embedded SmolLM2-135M-Instruct.",
    ),
]
BaseName = Annotated[
    list[str] | None,
    typer.Option(
        "--base-name",
        metavar="NAME",
        envvar="LORASTACK_BASE_NAME",
        help="Another name of the model, for adapters made under it. May be repeated.",
    ),
]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        parser=path,
        envvar="LORASTACK_STORE",
        help="Where adapters are kept.",
        show_default="~/.local/share/lorastack/store",
    ),
]


def default_store() -> Path:
    """The user's data folder for adapters: XDG's, else ~/.local/share."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "lorastack" / "store"


def size(text: str | None) -> str | None:
    """Option callback: a positive number of bytes, kept as the user wrote it."""
    try:
        if text is None or parse_size(text) > 0:
            return text
    except ValueError:
        pass
    raise typer.BadParameter(
        f"{text!r} is not a size; write 512MiB, 1.5GiB, 2TiB or a number of bytes"
    )


# What runs the base model: options of every command that loads one.
DeviceOption = Annotated[
    Device, typer.Option("--device", envvar="LORASTACK_DEVICE", help=Device.__doc__)
]
DTypeOption = Annotated[
    DType, typer.Option("--dtype", envvar="LORASTACK_DTYPE", help=DType.__doc__)
]
BackendOption = Annotated[
    Backend, typer.Option("--backend", envvar="LORASTACK_BACKEND", help=Backend.__doc__)
]
Isa = Annotated[
    str | None,
    typer.Option(
        "--isa",
        metavar="NAME",
        envvar="LORASTACK_ISA",
        help="Let native kernels use no better instruction set than this one, such as avx2.",
        show_default="the best that this machine has",
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        "--quantize",
        envvar="LORASTACK_QUANTIZE",
        help="Store the base model's weights in 8 or 4 bits.",
        show_default="as they are",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=MOST_THREADS,
        metavar="N",
        envvar="LORASTACK_THREADS",
        help="CPU threads of a step.",
    ),
]


def _kv_memory(most: str) -> Any:
    return typer.Option(
        "--kv-memory",
        metavar="SIZE",
        callback=size,
        envvar="LORASTACK_KV_MEMORY",
        help="Memory for keys and values of all rows.",
        show_default=f"{most}, or what is left; on a GPU four fifths of that",
    )


KvMemory = Annotated[str | None, _kv_memory("4GiB")]
LocalKvMemory = Annotated[str | None, _kv_memory("1536MiB")]  # without a server
MaxRows = Annotated[
    int | None,
    typer.Option(
        "--max-rows",
        min=1,
        max=INT32,
        metavar="N",
        envvar="LORASTACK_MAX_ROWS",
        help="Rows in a batch.",
        show_default="32; on a GPU 128",
    ),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        "--max-context",
        min=2,
        max=INT32,
        metavar="N",
        envvar="LORASTACK_MAX_CONTEXT",
        help="Tokens of a prompt and its output together.",
        show_default="the model's",
    ),
]
