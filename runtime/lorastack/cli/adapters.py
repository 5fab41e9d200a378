"""`lorastack adapters`: what a server stores, and checks of folders and stores without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lorastack.adapters.store.fsck import check_store
from lorastack.adapters.store.ids import NO_HEADS
from lorastack.cli.inputs import lora_ref
from lorastack.cli.options import (
    UINT32,
    BaseName,
    IfDigest,
    Json,
    Model,
    Server,
    Store,
    default_store,
    path,
)
from lorastack.cli.output import (
    human_size,
    print_json,
    print_table,
    progress_bar,
    short_digest,
    to_dict,
)
from lorastack.client import DEFAULT_SERVER, Adapter, Client
from lorastack.printable import one_line

adapters = typer.Typer(help="Upload, list, show, delete and verify adapters.")

Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", parser=path, help="The adapter's folder.", show_default=False),
]
AcceptBase = Annotated[
    bool,
    typer.Option("--accept-base", help="Take it although its config names another base model."),
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The adapter's id.", show_default=False)]


@adapters.callback(invoke_without_command=True)
def top(context: typer.Context) -> None:
    """Upload, list, show, delete and verify adapters."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@adapters.command()
def upload(
    folder: Folder,
    adapter_id: Annotated[
        str, typer.Option("--id", metavar="ID", help="[namespace/]name.", show_default=False)
    ],
    if_digest: IfDigest = None,
    accept_base: AcceptBase = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Store a PEFT LoRA, Medusa heads, or a bundle of both under an id."""
    with Client(server) as client, progress_bar(f"uploading {adapter_id}") as progress:
        adapter = client.upload(
            folder,
            adapter_id,
            if_digest=if_digest,
            accept_base=accept_base,
            progress=progress,
            left_out=say_left_out,
        )
    show_stored(adapter, as_json)


@adapters.command()
def alias(
    alias_id: Annotated[
        str, typer.Argument(metavar="NAME", help="The alias' id.", show_default=False)
    ],
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="ID[:SCALE]", help="A LoRA; repeat it for a stack."),
    ] = None,
    medusa_id: Annotated[
        str,
        typer.Option("--medusa", metavar="ID|none", help="Its heads.", show_default="not its part"),
    ] = "",
    if_digest: IfDigest = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Name a selection of stored LoRAs and heads; requests give the name as their LoRA."""
    refs = [lora_ref(text) for text in lora or ()]
    loras = [(ref.lora_id, ref.scale if ref.HasField("scale") else 1.0) for ref in refs]
    with Client(server) as client:
        show_stored(client.alias(alias_id, loras, medusa_id, if_digest=if_digest), as_json)


@adapters.command("list")
def list_adapters(
    prefix: Annotated[str, typer.Option("--prefix", help="Only ids that start so.")] = "",
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """List all stored adapters."""
    with Client(server) as client:
        listed = client.list_adapters(prefix)
        stored, _ = client.disk_usage()
    if as_json:
        print_json({"adapters": [to_dict(adapter) for adapter in listed]})
        return
    aliases = any(adapter.kind == Adapter.ALIAS for adapter in listed)
    rows = [
        (
            adapter.id,
            _kind(adapter),
            adapter.rank or "",
            _heads(adapter),
            human_size(adapter.size_bytes),
            Adapter.Residency.Name(adapter.residency).lower(),
            short_digest(adapter.digest),
            *([_stands_for(adapter)] if aliases else []),
        )
        for adapter in listed
    ]
    headings = ("id", "kind", "rank", "heads", "size", "where", "digest")
    print_table((*headings, *(["stands for"] if aliases else [])), rows)
    typer.echo(f"{human_size(stored)} on the server's disk, with older revisions", err=True)


@adapters.command()
def show(adapter_id: Id, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Show one adapter; ID@sha256:... names a revision."""
    with Client(server) as client:
        show_adapter(client.get_adapter(adapter_id), as_json)


@adapters.command()
def revisions(adapter_id: Id, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """List an id's revisions, newest first; ID@DIGEST serves one of them."""
    with Client(server) as client:
        listed = client.list_revisions(adapter_id)
    if as_json:
        print_json({"revisions": [to_dict(adapter) for adapter in listed]})
        return
    rows = [
        (
            adapter.revision,
            f"{adapter.created_at.ToDatetime():%Y-%m-%d %H:%M:%S}",
            _kind(adapter),
            human_size(adapter.size_bytes),
            adapter.digest,
        )
        for adapter in listed
    ]
    print_table(("revision", "created", "kind", "size", "digest"), rows)


@adapters.command()
def rollback(
    adapter_id: Id,
    digest: Annotated[
        str,
        typer.Argument(
            metavar="DIGEST",
            help="As `revisions` shows it; 8 of its digits may do.",
            show_default=False,
        ),
    ],
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Make an earlier revision's content the newest revision."""
    with Client(server) as client:
        show_adapter(client.rollback(adapter_id, digest), as_json)


@adapters.command()
def prune(
    adapter_id: Annotated[
        str, typer.Argument(metavar="[ID]", help="Left out: every adapter.", show_default=False)
    ] = "",
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            min=1,
            max=UINT32,
            metavar="N",
            help="Newest revisions to keep of each.",
            show_default="as many as the server keeps anyway",
        ),
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Remove old revisions and free their bytes. What running requests or pins use stays."""
    with Client(server) as client:
        pruned = client.prune_revisions(adapter_id, keep=keep)
    if as_json:
        print_json(to_dict(pruned))
    else:
        freed = human_size(pruned.freed_bytes)
        typer.echo(f"removed {pruned.removed_revisions} revisions, freed {freed}")


@adapters.command()
def load(
    adapter_id: Id,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it there until `unload`.")] = False,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Bring an adapter onto the device before requests need it."""
    with Client(server) as client:
        show_adapter(client.load(adapter_id, pin=pin), as_json)


@adapters.command()
def unload(adapter_id: Id, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Take an adapter and its pin out of memory. Running requests finish."""
    with Client(server) as client:
        show_adapter(client.unload(adapter_id), as_json)


@adapters.command()
def default(
    medusa_id: Annotated[
        str | None, typer.Argument(metavar="[ID|none]", help="Left out: show the default heads.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Choose the Medusa heads of requests that name none; `none` for no heads."""
    with Client(server) as client:
        if medusa_id is None:
            info = client.model_info()
            heads = {
                "medusa_id": info.default_medusa_id,
                "medusa_digest": info.default_medusa_digest,
            }
        else:
            wanted = "" if medusa_id == NO_HEADS else medusa_id
            heads = to_dict(client.set_default_medusa(wanted))
    if as_json:
        print_json(heads)
    else:
        typer.echo(one_line(" ".join(heads.values())) if heads["medusa_id"] else NO_HEADS)


@adapters.command()
def delete(adapter_id: Id, server: Server = DEFAULT_SERVER, as_json: Json = False) -> None:
    """Delete an id with all its revisions. Running requests finish."""
    with Client(server) as client:
        client.delete_adapter(adapter_id)
    if as_json:
        print_json({"deleted": adapter_id})
    else:
        typer.echo(f"deleted {adapter_id}")


@adapters.command()
def verify(
    folder: Folder,
    model: Model = None,
    base_name: BaseName = None,
    accept_base: AcceptBase = False,
    as_json: Json = False,
) -> None:
    """Check a folder as an upload would, without a server, and say what it holds.

    Only a server compiles its chat template, in a process of limited means.
    """
    # Deferred: the other commands must not wait for torch.
    from lorastack.cli.verify import verify_folder

    with progress_bar("fetching the default model") as progress:
        facts = verify_folder(
            folder, model, progress, base_names=base_name or (), accept_base=accept_base
        )
    if as_json:
        print_json(facts)
    else:
        _print_fields({"folder": str(folder), **facts})


@adapters.command()
def fsck(
    store: Store = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a store, also while a server uses it. Exit code 1 if any is damaged."""
    with progress_bar("reading the store") as progress:
        report = check_store(default_store() if store is None else store, progress)
    if as_json:
        print_json(asdict(report))
    else:
        for damage in report.damaged:
            used_by = ", ".join(f"{use.file} of {use.id}@{use.digest}" for use in damage.used_by)
            line = f"damaged: {damage.path}: {damage.problem}; used by {used_by or 'unknown'}"
            typer.echo(one_line(line))
        typer.echo(
            f"{report.num_adapters} adapters, {report.num_revisions} revisions, "
            f"{report.num_blobs} blobs of {human_size(report.size_bytes)}: "
            f"{len(report.damaged)} damaged, {len(report.orphans)} not needed, "
            f"{len(report.staged)} unfinished uploads"
        )
    raise typer.Exit(1 if report.damaged else 0)


def say_left_out(names: Sequence[str]) -> None:
    """Prints one line that names the files beside an adapter that are no part of it."""
    line = f"left out, as an adapter does not need it: {', '.join(names)}"
    typer.echo(one_line(line), err=True)


def show_stored(adapter: Adapter, as_json: bool) -> None:
    """Prints an adapter that was just stored, after its warnings."""
    if not adapter.base_model and adapter.kind != Adapter.ALIAS:
        typer.echo(
            "warning: its config names no base model; only shapes were checked against the "
            "server's",
            err=True,
        )
    for warning in adapter.warnings:
        typer.echo(one_line(f"warning: {warning}"), err=True)
    show_adapter(adapter, as_json)


def show_adapter(adapter: Adapter, as_json: bool) -> None:
    """Prints all fields of one adapter."""
    fields = to_dict(adapter)
    if as_json:
        print_json(fields)
    else:
        shown = {"kind": _kind(adapter), "alias_loras": _loras_of(adapter)}
        _print_fields({**fields, **shown})


def _loras_of(adapter: Adapter) -> list[str]:
    """What an alias names, as --lora takes it."""
    return [
        ref.lora_id if ref.scale == 1.0 else f"{ref.lora_id}:{ref.scale:g}"
        for ref in adapter.alias_loras
    ]


def _stands_for(adapter: Adapter) -> str:
    heads = [f"heads {adapter.alias_medusa_id}"] if adapter.alias_medusa_id else []
    return ", ".join((*_loras_of(adapter), *heads))


def _heads(adapter: Adapter) -> str:
    """How many heads it has, and whose they are if it only corrects them."""
    number = str(adapter.num_heads or "")
    return f"{number} of {adapter.shared_heads_id}" if adapter.private_rank else number


def _kind(adapter: Adapter) -> str:
    return Adapter.Kind.Name(adapter.kind).lower()


def _print_fields(fields: dict[str, object]) -> None:
    """Prints aligned names and values, False too, but no empty ones."""
    shown = {
        name: value
        for name, value in fields.items()
        if value is False or value not in ("", 0, [], None)
    }
    width = max(map(len, shown))
    for name, value in shown.items():
        if isinstance(value, list):
            text = ", ".join(map(str, value))
        elif isinstance(value, dict):
            text = ", ".join(f"{key} {inner}" for key, inner in value.items())
        elif isinstance(value, int) and name.endswith("_bytes"):
            text = human_size(value)
        else:
            text = str(value)
        typer.echo(f"{name:<{width}}  {one_line(text)}")
