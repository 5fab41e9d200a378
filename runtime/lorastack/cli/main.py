"""The `lorastack` command. Client commands import neither torch nor transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lorastack import __version__
from lorastack.cli.adapters import adapters
from lorastack.cli.bench import bench
from lorastack.cli.generate import generate
from lorastack.cli.serve import serve
from lorastack.cli.transfer import convert, export, pull, push
from lorastack.errors import LorastackError

app = typer.Typer(
    name="lorastack",
    help="One base model, many LoRA adapters and Medusa heads, chosen per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(bench)
for command in (pull, export, push, convert):
    adapters.command()(command)
app.add_typer(adapters, name="adapters")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorastack {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """One base model, many LoRA adapters and Medusa heads, chosen per request."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0, 1 for a failure (one line on stderr), 2 for wrong usage."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="lorastack")
    except LorastackError as error:
        typer.echo(f"lorastack: {' '.join(error.message.split())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
