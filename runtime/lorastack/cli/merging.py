"""`lorastack adapters merge`: one LoRA of several."""

from __future__ import annotations

from typing import Annotated

import typer

from lorastack.cli.adapters import show_stored
from lorastack.cli.inputs import lora_ref
from lorastack.cli.options import Json, Server
from lorastack.client import DEFAULT_SERVER, Client
from lorastack.client.merging import MajoritySign, Strategy


def merge(
    lora: Annotated[
        list[str],
        typer.Option(
            "--lora", metavar="ID[:WEIGHT]", help="Two or more; repeat it.", show_default=False
        ),
    ],
    strategy: Annotated[Strategy, typer.Option("--strategy", help="How values are combined.")],
    density: Annotated[
        float, typer.Option("--density", help="The share of values that stays, up to 1.")
    ] = 0.5,
    majority_sign: Annotated[
        MajoritySign, typer.Option("--majority-sign", help="Whose sign wins; not of dare_linear.")
    ] = "total",
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Merge LoRAs of one rank into a stored one, as PEFT does; the same request gives the same."""
    loras = [lora_ref(text) for text in lora]
    with Client(server) as client:
        merged = client.merge(loras, strategy, density, majority_sign=majority_sign)
    show_stored(merged, as_json)
