"""`lorastack generate`: one request to a running server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorastack.cli.inputs import lora_ref, response_format, set_input
from lorastack.cli.options import UINT32, UINT64, Json, Server
from lorastack.cli.output import print_json, short_digest, shown, to_dict
from lorastack.client import (
    DEFAULT_SERVER,
    OFF,
    Client,
    GenerateRequest,
    GenerateResponse,
    OutputParams,
    SamplingParams,
    Speculation,
    StopParams,
    Token,
)
from lorastack.printable import one_line

MAX_NEW_TOKENS = 512  # a first prompt should not run for minutes
RETRIES = 5  # while the server has no room


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The prompt; - reads it from stdin.", show_default=False
        ),
    ] = None,
    messages: Annotated[
        str,
        typer.Option(
            "--messages",
            metavar="FILE",
            help='Instead: a JSON list of {"role", "content"}, a conversation; - is stdin.',
        ),
    ] = "",
    token_ids: Annotated[
        str, typer.Option("--token-ids", metavar="N,N,...", help="Instead: the prompt's tokens.")
    ] = "",
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
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, max=UINT32, help="0: no limit.", metavar="N")
    ] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="1: no limit.")] = 1.0,
    min_p: Annotated[float, typer.Option("--min-p", help="0: no limit.")] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="1: none.")
    ] = 1.0,
    frequency_penalty: Annotated[float, typer.Option("--frequency-penalty", help="0: none.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option("--presence-penalty", help="0: none.")] = 0.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=UINT64, metavar="N", help="Default: the server draws one."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            min=0,
            max=UINT32,
            metavar="N",
            help="0: as many as the context has room for.",
        ),
    ] = MAX_NEW_TOKENS,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop sequence; repeatable.")
    ] = None,
    json_schema: Annotated[
        str,
        typer.Option(
            "--json-schema", metavar="FILE|TEXT", help="Text that fits this schema: JSON."
        ),
    ] = "",
    regex: Annotated[
        str, typer.Option("--regex", metavar="REGEX", help="Text that matches as a whole.")
    ] = "",
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Log probabilities of the tokens, to stderr.")
    ] = False,
    top_logprobs: Annotated[
        int,
        typer.Option(
            "--top-logprobs",
            min=0,
            max=UINT32,
            metavar="N",
            help="Also of the N likeliest tokens at each place; implies --logprobs.",
        ),
    ] = 0,
    no_speculation: Annotated[
        bool, typer.Option("--no-speculation", help="One token a step; the tokens are the same.")
    ] = False,
    max_nodes: Annotated[
        int | None,
        typer.Option(
            "--max-nodes", min=0, max=UINT32, metavar="N", help="Drafted tokens a step at most."
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="SECONDS", help="The call's deadline. Default: none."),
    ] = None,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Generate text, streamed to stdout; a summary goes to stderr."""
    if timeout is not None and not 0 < timeout < float("inf"):
        raise typer.BadParameter("it is not a number above 0", param_hint="--timeout")
    request = GenerateRequest(
        loras=[lora_ref(text) for text in lora or ()],
        medusa_id=medusa,
        speculation=Speculation(mode=OFF if no_speculation else None, max_nodes=max_nodes),
        sampling=SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            presence_penalty=presence_penalty,
            seed=seed,
        ),
        stop=StopParams(max_new_tokens=max_new_tokens or None, stop_sequences=stop or ()),
        output=OutputParams(logprobs=logprobs or top_logprobs > 0, top_logprobs=top_logprobs),
        response_format=response_format(json_schema, regex),
    )
    set_input(
        request,
        prompt=prompt,
        messages=messages,
        token_ids=token_ids,
        chat=chat,
        system=system,
    )
    with Client(server, retries=RETRIES) as client:
        if as_json:
            print_json(to_dict(client.generate(request, timeout=timeout)))
        else:
            _stream(client, request, timeout)


def _stream(client: Client, request: GenerateRequest, timeout: float | None) -> None:
    """Text to stdout as it comes; log probabilities, if asked for, and the summary to stderr."""
    final, tokens = GenerateResponse(), list[Token]()
    on_terminal = sys.stdout.isatty()  # a file gets the text as it is
    for part in client.stream(request, timeout=timeout):
        # color: else typer takes escape sequences out of what goes into a file.
        typer.echo(shown(part.text) if on_terminal else part.text, nl=False, color=True)
        tokens.extend(token for token in part.tokens if token.HasField("logprob"))
        if part.HasField("final"):
            final = part.final
    typer.echo()
    for token in tokens:
        top = "".join(f"  {other.logprob:.3f} {other.text!r}" for other in token.top)
        typer.echo(f"{token.logprob:.3f} {token.text!r}{top and ' of'}{top}", err=True)
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
        used = final.adapters
        parts.append(f"heads {used.medusa_id} {short_digest(used.medusa_digest)}")
        if used.shared_medusa_id:
            shared = short_digest(used.shared_medusa_digest)
            parts[-1] += f" of {used.shared_medusa_id} {shared}"
    return one_line(f"[{', '.join(parts)}]")
