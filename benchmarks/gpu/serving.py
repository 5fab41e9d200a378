"""The engine in this process: drafts change no token, and what they bring.

128 mixed requests, greedy and drawn, with LoRAs and stacks of them, run once without drafts and
once with; heads are scripted and guess right about half the time. Then eight rows of Mistral-7B's
shapes, timed.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.models import random_backend, random_lora
from benchmarks.gpu.record import Cases, Finding
from benchmarks.gpu.setting import Setting
from lorastack.engine.views import make_views
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from lorastack.request import (
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
    TokenSource,
)
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.scripted import Bench, Output, Script, scripted_heads
from tests.helpers.tiny import write_tokenizer

HEADS = {"heads-2": 2, "heads-4": 4}
TARGETS: dict[str, tuple[int, tuple[str, ...]]] = {  # rank and targets
    "lora-all": (5, (*LAYER_TARGETS, LM_HEAD, EMBED)),
    "lora-16": (16, LAYER_TARGETS),
    "lora-some": (33, ("q_proj", "o_proj", "gate_proj")),
}
TIMED_ROWS, TIMED_TOKENS = 8, 96


def cases(setting: Setting) -> Cases:
    return {
        "mixed requests": partial(_mixed, setting),
        "8 rows of Mistral-7B's shapes": partial(_timed, setting),
    }


def _bench(setting: Setting, shapes: ModelShapes, loras: Sequence[str]) -> Bench:
    """A random model in bfloat16, adapters, and a tokenizer of a few ids."""
    backend = random_backend(shapes, torch.bfloat16, setting.device)
    adapters = {digest: scripted_heads(digest, count) for digest, count in HEADS.items()}
    for digest in loras:
        rank, targets = TARGETS[digest]
        lora = random_lora(
            shapes, torch.bfloat16, setting.device, digest=digest, rank=rank, targets=targets
        )
        views = make_views(backend, lora.digest, lora.buffer, lora.layout)
        adapters[digest] = replace(lora, views=views)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return Bench(backend, Tokenizer.load(Path(folder)), adapters)


def _requests(setting: Setting, vocab: int) -> list[Request]:
    chance = random.Random(3)
    count, longest, most = (2, 4, 5) if setting.tiny else (128, 60, 48)
    requests = []
    for index in range(count):
        stack = sorted(chance.sample([*TARGETS], (1, 2, 0, 1)[index % 4]))
        # Two of three have heads, every other one is greedy.
        heads = chance.choice([*HEADS]) if index % 3 != 2 else None
        sampling = SamplingParams(
            temperature=0.8 if index % 2 else 0.0,
            top_p=0.95 if index % 8 == 1 else 1.0,
            top_k=40 if index % 8 == 3 else 0,
            seed=chance.getrandbits(64),
        )
        requests.append(
            Request(
                request_id=f"{index}",
                prompt_ids=tuple(chance.choices(range(4, vocab), k=chance.randint(3, longest))),
                sampling=sampling,
                stop=StopParams(
                    max_new_tokens=chance.randint(most // 2 + 1, most), ignore_eos=True
                ),
                speculation=SpeculationParams(max_nodes=3 if setting.tiny else None),
                loras=tuple(
                    LoraUse(lora_id=each, digest=each, scale=chance.choice((1.0, 0.5)))
                    for each in stack
                ),
                heads=None if heads is None else HeadsUse(medusa_id=heads, digest=heads),
            )
        )
    return requests


def without_drafts(requests: Sequence[Request]) -> list[Request]:
    return [replace(each, speculation=SpeculationParams(enabled=False)) for each in requests]


def drafting(script: Script, outputs: Mapping[str, Output]) -> Script:
    """Heads guess at what was found without them."""
    return replace(script, answers={name: each.ids for name, each in outputs.items()})


def _mixed(setting: Setting) -> Iterator[Finding]:
    bench = _bench(setting, setting.small, [*TARGETS])
    requests = _requests(setting, setting.small.vocab_size)
    script = Script(num_pages=64 if setting.tiny else 1024, page_size=4 if setting.tiny else 16)
    off = bench.run(without_drafts(requests), script, random.Random(1))
    # Others are beside each row than before, and not all come at once.
    script = replace(drafting(script, off), arriving=3 if setting.tiny else 20, max_rows=24)
    auto = bench.run(requests, script, random.Random(2))
    errors = sum(each.error is not None for run in (off, auto) for each in run.values())
    yield Finding("rows that failed", errors, most=0)
    wrong = sum(off[name].ids != each.ids for name, each in auto.items())
    yield Finding(f"requests of {len(auto)} whose tokens differ with drafts", wrong, most=0)
    accepted = sum(
        each.final.speculation.accepted[TokenSource.HEADS]
        for each in auto.values()
        if each.final is not None
    )
    yield Finding("drafted tokens that were accepted", accepted, least=1)


def _timed(setting: Setting) -> Iterator[Finding]:
    """Tokens a second of a whole run, its short prompts included; the second of two runs."""
    bench, chance = _bench(setting, setting.mistral, ["lora-16"]), random.Random(4)
    vocab = setting.mistral.vocab_size
    rows, tokens = (1, 3) if setting.tiny else (TIMED_ROWS, TIMED_TOKENS)
    requests = [
        Request(
            request_id=f"{index}",
            prompt_ids=tuple(chance.choices(range(4, vocab), k=4 if setting.tiny else 32)),
            sampling=SamplingParams(),
            stop=StopParams(max_new_tokens=tokens, ignore_eos=True),
            heads=HeadsUse(medusa_id="heads-4", digest="heads-4"),
        )
        for index in range(rows)
    ]
    script = Script(num_pages=256)
    kv = bench.decoder.make_kv(script.num_pages, script.page_size)
    # One cache for all runs, as graphs belong to one.
    bench.decoder.make_kv = lambda num_pages, page_size: kv  # type: ignore[method-assign]
    off, seconds = _second(partial(bench.run, without_drafts(requests), script))
    count = sum(len(each.ids) for each in off.values())
    yield Finding("tokens", count, least=rows * tokens, most=rows * tokens)
    yield Finding("without drafts", count / seconds, "tokens/s")
    auto, seconds = _second(partial(bench.run, requests, drafting(script, off)))
    yield Finding("with drafts", count / seconds, "tokens/s")
    steps = sum(each.final.speculation.steps for each in auto.values() if each.final)
    yield Finding("tokens that a row gains with drafts", count / max(steps, 1), "a step")
    wrong = sum(off[name].ids != each.ids for name, each in auto.items())
    yield Finding(f"requests of {len(auto)} whose tokens differ with drafts", wrong, most=0)


def _second(run: Callable[[random.Random], dict[str, Output]]) -> tuple[dict[str, Output], float]:
    """Of two equal runs, the first of which compiles and captures."""
    run(random.Random(5))
    began = time.perf_counter()
    outputs = run(random.Random(5))
    return outputs, time.perf_counter() - began
