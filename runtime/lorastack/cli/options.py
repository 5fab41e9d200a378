"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lorastack.client import DEFAULT_SERVER
from lorastack.config import parse_size

Server = Annotated[
    str,
    typer.Option("--server", metavar="HOST:PORT", envvar="LORASTACK_SERVER", help="Which server."),
]
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
        envvar="LORASTACK_STORE",
        help="Where adapters are kept.",
        show_default="~/.local/share/lorastack/store",
    ),
]

__all__ = [
    "DEFAULT_SERVER",
    "BaseName",
    "IfDigest",
    "Json",
    "Model",
    "Server",
    "Store",
    "default_store",
    "size",
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
    except (ValueError, OverflowError):
        pass
    raise typer.BadParameter(f"{text!r} is not a size; write 512MiB, 2GiB or a number of bytes")
