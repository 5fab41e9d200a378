"""`lorastack adapters` commands that move whole folders: pull, export, push, convert."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from lorastack.cli.adapters import AcceptBase, Id, say_left_out, show_stored
from lorastack.cli.options import IfDigest, Json, Server, path
from lorastack.cli.output import print_json, progress_bar
from lorastack.client import DEFAULT_SERVER, Client
from lorastack.printable import one_line

NewFolder = Annotated[
    Path,
    typer.Argument(metavar="DIR", parser=path, help="A new or empty folder.", show_default=False),
]
TokenEnv = Annotated[
    str | None,
    typer.Option(
        "--token-env",
        metavar="NAME",
        help="The environment variable that holds a token of the hub.",
        show_default=False,
    ),
]


def pull(
    adapter_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="As --id.", show_default=False)
    ] = None,
    option_id: Annotated[
        str | None,
        typer.Option("--id", metavar="ID", help="[namespace/]name.", show_default=False),
    ] = None,
    hub: Annotated[
        str, typer.Option("--hub", metavar="ORG/NAME", help="From the hub.", show_default=False)
    ] = "",
    folder: Annotated[
        str,
        typer.Option(
            "--folder",
            metavar="DIR",
            help="From a folder of the server's machine.",
            show_default=False,
        ),
    ] = "",
    revision: Annotated[
        str,
        typer.Option(
            "--revision",
            metavar="REVISION",
            help="Branch, tag or commit of the hub.",
            show_default="main",
        ),
    ] = "",
    token_env: TokenEnv = None,
    if_digest: IfDigest = None,
    accept_base: AcceptBase = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Let the server fetch an adapter itself, from the hub or from a folder of its machine."""
    if bool(hub) == bool(folder):
        raise typer.BadParameter("name one of --hub and --folder")
    if (adapter_id is None) == (option_id is None):
        raise typer.BadParameter("name the adapter's id once, by --id ID or as the argument")
    adapter_id = adapter_id or option_id or ""
    token = _token(token_env) or ""
    with Client(server) as client, progress_bar(f"pulling {adapter_id}") as progress:
        adapter = client.pull(
            adapter_id,
            hub_id=hub,
            folder=folder,
            revision=revision,
            token=token,
            if_digest=if_digest,
            accept_base=accept_base,
            progress=progress,
            left_out=say_left_out,
        )
    show_stored(adapter, as_json)


def export(
    adapter_id: Id, folder: NewFolder, server: Server = DEFAULT_SERVER, as_json: Json = False
) -> None:
    """Write an adapter's files into a folder; ID@sha256:... names a revision."""
    with Client(server) as client, progress_bar(f"exporting {adapter_id}") as progress:
        adapter = client.download(adapter_id, folder, progress=progress)
    if as_json:
        print_json({"id": adapter.id, "digest": adapter.digest, "folder": str(folder)})
    else:
        typer.echo(one_line(f"{adapter.id} {adapter.digest} is in {folder}"))


def push(
    adapter_id: Id,
    hub_id: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The hub's name for it.", show_default=False)
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository private, if there is none.")
    ] = False,
    token_env: TokenEnv = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Put an adapter onto the hub from here, with --token-env's token or your own login there."""
    # Deferred: the other commands must not wait for it.
    from lorastack.adapters.sources.hub import push_folder

    token = _token(token_env)
    with tempfile.TemporaryDirectory(prefix="lorastack-push-") as temporary:
        folder = Path(temporary) / "adapter"
        with Client(server) as client, progress_bar(f"fetching {adapter_id}") as progress:
            adapter = client.download(adapter_id, folder, progress=progress)
        url = push_folder(folder, hub_id, private=private, token=token)
    if as_json:
        print_json({"id": adapter.id, "digest": adapter.digest, "hub_id": hub_id, "url": url})
    else:
        typer.echo(one_line(f"{adapter.id} {adapter.digest} is at {url}"))


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            parser=path,
            help="A folder with .pt or .bin weights.",
            show_default=False,
        ),
    ],
    folder: NewFolder,
    as_json: Json = False,
) -> None:
    """Turn .pt and .bin weights into safetensors, on this machine; configs come along."""
    # Deferred: the other commands must not wait for torch.
    from lorastack.cli.convert import convert_folder

    converted, left_out = convert_folder(source, folder)
    if as_json:
        print_json({"folder": str(folder), "converted": converted, "left_out": left_out})
        return
    for old, new in converted.items():
        typer.echo(one_line(f"{old} -> {folder / new}"))
    if left_out:
        typer.echo(one_line(f"left out: {', '.join(left_out)}"), err=True)


def _token(variable: str | None) -> str | None:
    """The token in a variable: arguments could be read by every process of the machine."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise typer.BadParameter(
            f"the environment variable {variable!r} is not set", param_hint="--token-env"
        )
    return token
