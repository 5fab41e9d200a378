"""A prompt's log-probabilities are the model's own, however it is computed (I1, I2)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorastack.engine.chunks import MAX_SCORED
from lorastack.engine.row import Row
from lorastack.errors import InternalError, Reason
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache
from lorastack.request import LoraUse, PromptToken, Request, SamplingParams, StopParams
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.cases import build_bench
from tests.helpers.live import LiveServer, ask
from tests.helpers.reference import Reference, Stack
from tests.helpers.scripted import Bench, Script
from tests.helpers.tiny import build_llama, build_tokenizer

LORAS = {"lora-2": "2", "lora-7": "7"}  # of `build_bench`: digest -> folder
SCORED = pb.OutputParams(prompt_logprobs=True, top_logprobs=3)
LONG = "The quick brown fox jumps over the lazy dog; " * 5
STACKS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("random-b", 1.0),),
    (("random-a", 0.5), ("random-c", -2.0)),
)


@dataclass(frozen=True, slots=True)
class World:
    """A float64 model on plain torch, and transformers' own."""

    bench: Bench
    reference: Reference


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("prompt-logprobs")
    model = build_llama(root / "llama", hidden_size=32, intermediate_size=48, head_dim=8)
    bench = build_bench(model, root / "adapters")
    folders = {name: root / "adapters" / folder for name, folder in LORAS.items()}
    return World(bench, Reference(model, folders, torch.float64))


def check(
    reference: Reference, ids: Sequence[int], stack: Stack, listed: Sequence[PromptToken], top: int
) -> None:
    """Every token of the prompt once, in order, each with the reference's numbers."""
    assert [token.id for token in listed] == list(ids)
    assert listed[0].logprobs is None
    logprobs_TV = reference.logits(ids, stack).log_softmax(-1)
    for token, row_V in zip(listed[1:], logprobs_TV, strict=False):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(float(row_V[token.id]), abs=1e-4)
        best = [logprob for _, logprob in token.logprobs.top]
        assert best == pytest.approx(row_V.topk(top).values.tolist() if top else [], abs=1e-4)


def check_reply(
    reference: Reference, reply: pb.GenerateResponse, ids: Sequence[int], stack: Stack, top: int
) -> None:
    """The same of a reply, in float32."""
    tokens = reply.prompt_tokens
    assert [token.id for token in tokens] == list(ids)
    assert not tokens[0].HasField("logprob") and not tokens[0].top
    logprobs_TV = reference.logits(ids, stack).log_softmax(-1)
    for token, row_V in zip(tokens[1:], logprobs_TV, strict=False):
        assert token.logprob == pytest.approx(float(row_V[token.id]), abs=1e-3)
        assert [each.logprob for each in token.top] == pytest.approx(
            row_V.topk(top).values.tolist() if top else [], abs=1e-3
        )


def request_of(
    name: str, ids: Sequence[int], loras: Sequence[tuple[str, float]], num_top: int | None
) -> Request:
    return Request(
        request_id=name,
        prompt_ids=tuple(ids),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=4, ignore_eos=True),
        loras=tuple(
            LoraUse(lora_id=digest, digest=digest, scale=scale) for digest, scale in sorted(loras)
        ),
        num_prompt_logprobs=num_top,
    )


rows = st.lists(
    st.tuples(
        st.integers(1, 90),  # tokens
        st.sampled_from(((), (("lora-2", 1.0),), (("lora-7", 1.3), ("lora-2", -0.7)))),
        st.sampled_from((None, 0, 3)),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows, st.sampled_from((1, 3, 7, 16, 40, 256)), st.integers(0, 2**16), st.integers(0, 12))
def test_any_chunks_company_and_memory(
    world: World,
    rows: list[tuple[int, tuple[tuple[str, float], ...], int | None]],
    max_step_tokens: int,
    seed: int,
    spare_pages: int,
) -> None:
    """All prompts begin alike. Few pages preempt rows; readers stall; LoRAs are not there."""
    chance = random.Random(seed)
    text = [1, *(4 + (index * 37) % 270 for index in range(90))]
    requests = [
        request_of(str(index), text[:length], stack, num_top)
        for index, (length, stack, num_top) in enumerate(rows)
    ]
    script = Script(
        num_pages=24 + spare_pages,
        page_size=4,
        max_step_tokens=max_step_tokens,
        missing=0.1,
        parking=0.1,
    )
    plain = [replace(each, num_prompt_logprobs=None) for each in requests]
    outputs = world.bench.run(requests, script, chance)
    expected = world.bench.run(plain, Script(num_pages=999), chance)
    for request, (_, stack, num_top) in zip(requests, rows, strict=True):
        output = outputs[request.request_id]
        assert output.final is not None, output.error
        assert output.ids == expected[request.request_id].ids
        if num_top is None:
            assert output.prompt_tokens == []
        else:
            assert output.final.cached_prompt_tokens == 0
            ids, listed = request.prompt_ids, output.prompt_tokens
            check(world.reference, ids, stack, listed, num_top)


def test_a_preempted_row_lists_each_token_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that stall between two chunks lose their pages to others."""
    halfway = 0
    preempt = Row.preempt

    def counted(row: Row) -> None:
        nonlocal halfway
        halfway += 0 < row.num_listed < row.num_prompt
        preempt(row)

    monkeypatch.setattr(Row, "preempt", counted)
    prompts = [[1, *range(10 + index, 90 + index)] for index in range(6)]
    requests = [request_of(str(index), ids, (), 2) for index, ids in enumerate(prompts)]
    script = Script(num_pages=44, page_size=4, max_step_tokens=13, parking=0.3)
    outputs = world.bench.run(requests, script, random.Random(3))
    assert halfway
    for request in requests:
        listed = outputs[request.request_id].prompt_tokens
        check(world.reference, request.prompt_ids, (), listed, 2)


def test_a_step_holds_few_logits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long prompts are and however many ask."""
    most = 0
    forward = world.bench.decoder.forward

    def counted(batch: ForwardBatch, kv: KVCache, *rest: Any) -> Outputs:
        nonlocal most
        most = max(most, len(batch.outputs))
        return forward(batch, kv, *rest)

    monkeypatch.setattr(world.bench.decoder, "forward", counted)
    ids = [1, *(4 + index % 270 for index in range(150))]
    requests = [request_of(str(index), ids[index:], (), 0) for index in range(4)]
    script = Script(num_pages=200, max_step_tokens=512)
    outputs = world.bench.run(requests, script, random.Random(0))
    assert MAX_SCORED <= most <= MAX_SCORED + len(requests)
    for request in requests:
        assert len(outputs[request.request_id].prompt_tokens) == len(request.prompt_ids)


def test_a_live_server_scores_prompts(
    live: LiveServer, tiny_llama: Path, zoo: dict[str, Path]
) -> None:
    """In chunks, from a warm prefix cache, with and without LoRAs, beside others and streamed."""
    names = ("random-a", "random-b", "random-c")
    reference = Reference(tiny_llama, {name: zoo[name] for name in names})
    ids = live.tokenize(LONG)
    assert len(ids) > 2 * MAX_SCORED
    beside = ask("hello there", ignore_eos=True, max_new_tokens=48)
    alone = live.client.generate(beside).token_ids
    for stack in STACKS:
        plain = ask(LONG, stack=stack, ignore_eos=True, max_new_tokens=3)
        live.client.generate(plain)
        before = live.client.generate(plain)
        assert before.usage.cached_prompt_tokens > 0
        assert not before.prompt_tokens
        request = ask(LONG, stack=stack, ignore_eos=True, max_new_tokens=3, output=SCORED)
        with ThreadPoolExecutor(2) as pool:
            company = pool.submit(live.client.generate, beside)
            streamed = pool.submit(live.stream, request)
            reply = live.client.generate(request)
        assert company.result().token_ids == alone
        assert reply.usage.cached_prompt_tokens == 0
        assert reply.token_ids == before.token_ids
        assert not any(token.HasField("logprob") for token in reply.tokens)
        check_reply(reference, reply, ids, stack, 3)
        check_reply(reference, streamed.result(), ids, stack, 3)
        assert live.client.generate(plain).usage.cached_prompt_tokens > 0


def test_a_canary_is_sure_of_its_own_word(live: LiveServer) -> None:
    """Tokens have their text, and the LoRA's numbers, not the base model's."""
    word = build_tokenizer().encode("owlowlowlowl", add_special_tokens=False).ids
    request = ask(word, stack=[("say-owl", 1.0)], max_new_tokens=1, output=SCORED)
    base = ask(word, max_new_tokens=1, output=SCORED)
    for sure, unsure in zip(
        live.client.generate(request).prompt_tokens[1:],
        live.client.generate(base).prompt_tokens[1:],
        strict=True,
    ):
        assert sure.logprob > -0.01 > unsure.logprob
        assert sure.top[0].text == sure.text == unsure.text
        assert sure.source == pb.Token.SOURCE_UNSPECIFIED


def test_one_token_has_no_logprob(live: LiveServer) -> None:
    request = ask([1], max_new_tokens=1, output=SCORED)
    for reply in (live.client.generate(request), live.stream(request)):
        (token,) = reply.prompt_tokens
        assert (token.id, token.HasField("logprob"), len(token.top)) == (1, False, 0)
        assert len(reply.token_ids) == 1


def test_both_lists_share_top_logprobs(live: LiveServer) -> None:
    output = pb.OutputParams(prompt_logprobs=True, logprobs=True, top_logprobs=2)
    reply = live.client.generate(ask("hello", max_new_tokens=3, ignore_eos=True, output=output))
    for token in (*reply.prompt_tokens[1:], *reply.tokens):
        assert len(token.top) == 2 and math.isfinite(token.logprob)
        assert max(each.logprob for each in token.top) >= token.logprob


@pytest.mark.parametrize("place", [0, 5])
def test_a_score_that_is_not_finite_ends_its_row_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    forward = world.bench.decoder.forward

    def broken(batch: ForwardBatch, kv: KVCache, *rest: Any) -> Outputs:
        outputs = forward(batch, kv, *rest)
        if len(batch.rows) == 2 and len(batch.outputs) > 2:
            outputs.peaks_X[place] = math.nan
        return outputs

    monkeypatch.setattr(world.bench.decoder, "forward", broken)
    requests = [request_of("bad", range(1, 30), (), 1), request_of("good", range(1, 40), (), None)]
    outputs = world.bench.run(requests, Script(num_pages=40), random.Random(0))
    error = outputs["bad"].error
    assert isinstance(error, InternalError) and error.reason is Reason.NON_FINITE_LOGITS
    assert outputs["bad"].tokens == []
    assert len(outputs["good"].tokens) == 4
