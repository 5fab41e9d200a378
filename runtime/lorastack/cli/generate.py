"""`lorastack generate`: one request to a running server."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from lorastack.cli.options import DEFAULT_SERVER, Json, Server
from lorastack.cli.output import print_json, short_digest, to_dict
from lorastack.client import (
    OFF,
    Client,
    GenerateRequest,
    GenerateResponse,
    LoraRef,
    SamplingParams,
    Speculation,
    StopParams,
)

# ID[:SCALE]; a revision (ID@sha256:...) has a colon of its own.
_LORA = re.compile(r"(?P<id>[^:@]+(?:@sha256:[^:]+)?)(?::(?P<scale>[^:]+))?")


def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from stdin.")],
    lora: Annotated[
        list[str] | None,
        typer.Option("--lora", metavar="ID[:SCALE]", help="A LoRA; repeat it for a stack."),
    ] = None,
    medusa: Annotated[
        str,
        typer.Option(
            "--medusa",
            metavar="ID",
            envvar="LORASTACK_MEDUSA_ID",
            help="Medusa heads; none for no heads; default: the bundle's, else the server's.",
        ),
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user message (chat template).")
    ] = False,
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="A system message; implies --chat.")
    ] = "",
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="0: no limit.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p")] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Default: the server draws one.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Default: up to the context.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop sequence; repeatable.")
    ] = None,
    no_speculation: Annotated[
        bool, typer.Option("--no-speculation", help="One token a step; the tokens are the same.")
    ] = False,
    max_nodes: Annotated[
        int | None, typer.Option("--max-nodes", min=0, help="Drafted tokens a step at most.")
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Generate text, streamed to stdout; a summary goes to stderr."""
    request = GenerateRequest(
        loras=[_lora_ref(text) for text in lora or ()],
        medusa_id=medusa,
        speculation=Speculation(mode=OFF if no_speculation else None, max_nodes=max_nodes),
        sampling=SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        stop=StopParams(max_new_tokens=max_new_tokens, stop_sequences=stop or ()),
    )
    if prompt == "-":
        prompt = sys.stdin.read()
    if chat or system:
        if system:
            request.chat.messages.add(role="system", content=system)
        request.chat.messages.add(role="user", content=prompt)
    else:
        request.prompt = prompt
    with Client(server) as client:
        if as_json:
            print_json(to_dict(client.generate(request)))
        else:
            _stream(client, request)


def _stream(client: Client, request: GenerateRequest) -> None:
    final = GenerateResponse()
    for part in client.stream(request):
        typer.echo(part.text, nl=False)
        sys.stdout.flush()
        if part.HasField("final"):
            final = part.final
    typer.echo()
    typer.echo(_summary(final), err=True)


def _summary(final: GenerateResponse) -> str:
    """One line: how it ended, how fast, and which adapters ran."""
    num_tokens, steps = final.usage.generated_tokens, final.speculation.steps
    parts = [
        f"{num_tokens} tokens",
        GenerateResponse.FinishReason.Name(final.finish_reason),
        f"{final.timings.total_ms / 1000:.2f} s",
    ]
    if steps:
        parts.append(f"{(num_tokens - 1) / steps:.2f} tokens a step")  # the prompt gave the first
    for use in final.adapters.loras:
        scale = "" if use.scale == 1 else f" x {use.scale:g}"
        parts.append(f"lora {use.lora_id} {short_digest(use.digest)}{scale}")
    if final.adapters.medusa_id:
        heads = final.adapters
        parts.append(f"heads {heads.medusa_id} {short_digest(heads.medusa_digest)}")
    return f"[{', '.join(parts)}]"


def _lora_ref(text: str) -> LoraRef:
    match = _LORA.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        scale = match["scale"]
        return LoraRef(lora_id=match["id"], scale=None if scale is None else float(scale))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not ID or ID:SCALE, such as lora-gsm8k:0.5", param_hint="--lora"
        ) from None
