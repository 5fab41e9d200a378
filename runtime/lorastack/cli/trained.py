"""Runs of `lorastack train`, and what it prints of results."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from lorastack.cli.machine import watching
from lorastack.cli.output import print_json, print_table
from lorastack.printable import one_line
from lorastack.train.pipeline import Outcome, make_heads
from lorastack.train.publish import Publication
from lorastack.train.run import HeadsRun

RANKS = (1, 2, 3, 5, 10)


def carry_out(run: HeadsRun, server: str, *, replace: bool, as_json: bool) -> None:
    """Makes what a run asks for and prints what came out.

    server: where it is uploaded to; "" for nowhere. replace: although the id exists there.
    """
    publication = Publication(server, run.adapter_id, replace=replace) if server else None
    try:
        with watching() as (loading, progress):
            outcome = make_heads(run, publication=publication, progress=progress, loading=loading)
    except KeyboardInterrupt:
        again = "the same command without --restart" if run.restart else "the same command"
        typer.echo(f"interrupted: {again} goes on with what is in {run.work}", err=True)
        raise
    show_outcome(outcome, server, as_json)


def show_outcome(outcome: Outcome, server: str, as_json: bool) -> None:
    """server: where it was uploaded to; "" for nowhere."""
    evaluation, distilled = outcome.evaluation, outcome.distilled
    if as_json:
        print_json(
            {
                "id": evaluation["name"],
                "folder": str(outcome.folder),
                "digest": outcome.digest,
                "uploaded_to": server or None,
                "prompts": distilled.num_prompts,
                "skipped": distilled.num_skipped,
                "tokens": distilled.num_tokens,
                "evaluation": evaluation,
                "served": outcome.served,
            }
        )
        return
    skipped = f", {distilled.num_skipped} skipped" if distilled.num_skipped else ""
    typer.echo(
        f"{distilled.num_samples} prompts answered in {distilled.num_tokens} tokens{skipped}"
    )
    if evaluation["held_out"] is None:
        typer.echo("no prompts were held out, so nothing was measured")
    else:
        show_ranked(evaluation["held_out"])
    if (drift := evaluation.get("joint", {}).get("drift")) is not None:
        typer.echo(
            f"the LoRA's distance from the base: {drift['kl']:.4f} nats a token, "
            f"and the same token is likeliest at {drift['same']:.1%} of the places"
        )
    if outcome.served is not None:
        typer.echo(f"served: {served_line(outcome.served)}")
    typer.echo(one_line(f"{outcome.digest} is in {outcome.folder}"))
    stored = f"it is stored at {server} as {evaluation['name']}"
    todo = ("lorastack", "adapters", "upload", str(outcome.folder), "--id", evaluation["name"])
    typer.echo(one_line(stored if server else f"store it with: {shlex.join(todo)}"))


def show_evaluation(evaluation: Mapping[str, Any], as_json: bool) -> None:
    """The JSON of `train.evaluate`: each cell, then all of them in one table."""
    if as_json:
        print_json(dict(evaluation))
        return
    cells = evaluation["cells"]
    for cell in cells:
        skipped = f", {cell['skipped']} skipped" if cell["skipped"] else ""
        typer.echo(
            one_line(f"{cell['heads']} on {cell['file']}: {cell['ranked']['prompts']} prompts")
            + skipped
        )
        show_ranked(cell["ranked"])
        typer.echo(f"served: {served_line(cell['served'])}\n")
    files = list(dict.fromkeys(cell["file"] for cell in cells))
    rows = [
        [heads, *(_crossing(cells, heads, file) for file in files)]
        for heads in dict.fromkeys(cell["heads"] for cell in cells)
    ]
    typer.echo("tokens a step, times the speed without drafts:")
    print_table(["heads", *files], rows)


def show_ranked(ranked: Mapping[str, Any]) -> None:
    """Shares of tokens among each head's best guesses, and what trees make of them."""
    rows: list[Sequence[object]] = [
        [f"head {number}", *(f"{shares[rank - 1]:.3f}" for rank in RANKS)]
        for number, shares in enumerate(ranked["top_1_to_10_by_head"], start=1)
    ]
    print_table(["", *(f"top-{rank}" for rank in RANKS)], rows)
    rates = ranked["tokens_a_step"]
    for what, unit in (("chain_by_length", "chain of"), ("tree_by_nodes", "tree of")):
        shown = ", ".join(f"{size}: {rate:.2f}" for size, rate in rates[what].items())
        typer.echo(f"tokens a step, {unit} {shown}")


def served_line(served: Mapping[str, Any]) -> str:
    """What the engine made of the heads."""
    line = (
        f"{served['tokens_a_step']:.2f} tokens a step, {served['tokens_a_second']:.1f} tokens a "
        f"second, {served['speed_up']:.2f} times those without drafts"
    )
    if served["different_replies"]:
        line += f"; {served['different_replies']} replies differ from those without drafts"
    return line


def _crossing(cells: Sequence[Mapping[str, Any]], heads: str, file: str) -> str:
    (served,) = (c["served"] for c in cells if (c["heads"], c["file"]) == (heads, file))
    return f"{served['tokens_a_step']:.2f} {served['speed_up']:.2f}x"
