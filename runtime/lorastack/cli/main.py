"""The `lorastack` command. Client commands import neither torch nor transformers."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, cast

import typer
import typer.main

from lorastack import __version__
from lorastack.cli.adapters import adapters
from lorastack.cli.bench import bench
from lorastack.cli.evaluate import evaluate_heads
from lorastack.cli.gateway import gateway
from lorastack.cli.generate import generate
from lorastack.cli.joint import train_joint
from lorastack.cli.merging import merge
from lorastack.cli.serve import serve
from lorastack.cli.train import train
from lorastack.cli.transfer import convert, export, pull, push
from lorastack.errors import LorastackError
from lorastack.printable import one_line

TRACEBACK = "LORASTACK_TRACEBACK"  # if set, an unforeseen error shows its traceback

app = typer.Typer(
    name="lorastack",
    help="One base model, many LoRA adapters and Medusa heads, chosen per request.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes cut names at 80 columns and give flags a value
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(generate)
app.command()(gateway)
app.command()(bench)
for command in (pull, export, push, convert, merge):
    adapters.command()(command)
train.command("joint")(train_joint)
train.command("eval")(evaluate_heads)
app.add_typer(adapters, name="adapters")
app.add_typer(train, name="train")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorastack {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """One base model, many LoRA adapters and Medusa heads, chosen per request."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@cache
def commands() -> Callable[..., int | None]:
    """The tree of commands: groups have `commands`, all have `params`."""
    return cast(Callable[..., int | None], typer.main.get_command(app))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0; 1 for a failure and 2 for wrong usage, each with one line on
    stderr; 130 after Ctrl-C.

    arguments: from a caller in Python, who gets unforeseen errors as they are.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names need not be valid text
            stream.reconfigure(errors="backslashreplace")
    if arguments is not None:
        sys.exit(_run(list(arguments)))
    try:
        sys.exit(_run(sys.argv[1:]))
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _say(f"a bug, please report it: {type(error).__name__}: {error} ({TRACEBACK}=1 says more)")
        sys.exit(1)


def _run(arguments: list[str]) -> int:
    """Runs a command and returns its exit code; an error has been printed."""
    try:
        code = commands()(args=arguments, prog_name="lorastack", standalone_mode=False)
        sys.stdout.flush()  # a closed pipe shows here, not when the interpreter ends
        return int(code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _pipe_closed()
    except typer.TyperException as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "lorastack")
        _say(f"{error.format_message().rstrip('.')}; see `{where} --help`")
        return error.exit_code
    except UnicodeEncodeError as error:
        _say(f"{error.object!r} is not valid UTF-8")
        return 2
    except LorastackError as error:
        _say(error.message)
    except OSError as error:
        _say(f"{error.filename or 'the system'}: {error.strerror or error}")
    return 1


def _say(message: str) -> None:
    typer.echo(f"lorastack: {one_line(message)}", err=True)


def _pipe_closed() -> int:
    """Our output's reader has closed it: what is still buffered is thrown away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    main()
