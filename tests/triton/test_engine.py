"""The engine on Triton's kernels: mixed requests, token for token what torch gives, drafts or not.

And bit for bit the same in bfloat16, where torch itself promises nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorastack.model.backends.load import load_backend
from lorastack.request import (
    HeadsUse,
    LoraUse,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
)
from tests.helpers.cases import build_bench, off
from tests.helpers.scripted import Bench, Output, Script
from tests.helpers.tiny import build_llama
from tests.helpers.triton_world import SMALL, tokens

MAX_NODES = 3  # drafted tokens: the interpreter takes its time


def request(
    name: str, sampling: SamplingParams, loras: Sequence[tuple[str, float]], heads: str | None
) -> Request:
    uses = tuple(LoraUse(lora_id=each, digest=each, scale=scale) for each, scale in loras)
    return Request(
        request_id=name,
        prompt_ids=tuple(tokens(len(name), len(name))),
        sampling=sampling,
        stop=StopParams(max_new_tokens=6, ignore_eos=True),
        speculation=SpeculationParams(max_nodes=MAX_NODES),
        loras=uses,
        heads=None if heads is None else HeadsUse(medusa_id=heads, digest=heads),
        num_logprobs=1 if "logprobs" in name else None,
        capture_states=True,
    )


REQUESTS = [
    request("greedy", SamplingParams(), (), "heads-3"),
    request(
        "stack, top_k",
        SamplingParams(temperature=0.8, top_k=40, seed=5),
        [("bundle", 0.7), ("lora-2", 1.0)],
        "bundle",
    ),
    request("nucleus", SamplingParams(temperature=1.1, top_p=0.9, seed=6), [("lora-7", 1.0)], None),
    request(
        "logprobs",
        SamplingParams(temperature=0.7, repetition_penalty=1.3, seed=7),
        [("lora-16", -0.7)],
        "heads-1",
    ),
    request("typical_p", SamplingParams(temperature=0.9, typical_p=0.8, seed=8), (), "heads-3"),
]


def bench_of(root: Path, dtype: torch.dtype, device: torch.device, triton: bool) -> Bench:
    model = root / "model"
    if not model.exists():
        build_llama(model, **SMALL)
    decoder = load_backend(
        model, device=device, dtype=dtype, max_context=None, native=False, triton=triton
    )
    return build_bench(model, root / f"adapters-{triton}", decoder)


def ids_of(outputs: dict[str, Output]) -> dict[str, list[int]]:
    assert all(output.error is None for output in outputs.values())
    return {name: output.ids for name, output in outputs.items()}


def states_of(output: Output) -> torch.Tensor:
    states_TH = torch.cat(output.states)
    assert len(states_TH) == len(output.ids)
    return states_TH


def run(
    bench: Bench, requests: Sequence[Request], answers: dict[str, list[int]]
) -> dict[str, Output]:
    script = Script(num_pages=24, page_size=4, answers=answers, heads_seconds=0.001)
    return bench.run(requests, script, random.Random(1))


def drafted(outputs: dict[str, Output]) -> int:
    """Drafted tokens that were accepted."""
    finals = [output.final for output in outputs.values()]
    return sum(final.speculation.accepted.total() for final in finals if final is not None)


def plain(requests: Sequence[Request]) -> list[Request]:
    return [off(each) for each in requests]


def test_float32_equals_torch_with_drafts(tmp_path: Path, device: torch.device) -> None:
    expected = run(bench_of(tmp_path, torch.float32, device, False), plain(REQUESTS), {})
    bench = bench_of(tmp_path, torch.float32, device, True)
    found = run(bench, REQUESTS, ids_of(expected))
    assert ids_of(found) == ids_of(expected)
    assert drafted(found) > 5
    for name, output in found.items():  # from memory that every step writes
        torch.testing.assert_close(
            states_of(output), states_of(expected[name]), atol=1e-4, rtol=1e-4
        )
    for mine, theirs in zip(found["logprobs"].tokens, expected["logprobs"].tokens, strict=True):
        assert mine.logprobs is not None and theirs.logprobs is not None
        assert mine.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-3)


def test_bfloat16_is_lossless(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and one after the other without drafts; all at once with them."""
    bench = bench_of(tmp_path, torch.bfloat16, device, True)
    monkeypatch.setattr(bench.decoder, "overlaps", True)  # as on a GPU
    chosen = [
        replace(each, stop=StopParams(max_new_tokens=5, ignore_eos=True)) for each in REQUESTS
    ]
    alone = {}
    for each in plain(chosen[:3]):
        alone |= run(bench, [each], {})
    found = run(bench, chosen[:3], ids_of(alone))
    assert ids_of(found) == ids_of(alone)
    assert all(torch.equal(states_of(found[name]), states_of(each)) for name, each in alone.items())
    assert drafted(found) > 2
