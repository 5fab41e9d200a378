"""The tokens are the reference's, and speculation, streaming and company never change them (I1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorastack.config import MIB, AdapterConfig, EngineConfig
from lorastack.layout import ModelShapes
from lorastack.text.joiner import UNKNOWN_CHARACTER
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.live import LiveServer, ask
from tests.helpers.reference import Reference, assert_greedy
from tests.helpers.tiny import build_tokenizer
from tests.helpers.zoo import FAMILIAR, NARROW_HEADS, TRAINED_HEADS

PROMPTS = (
    "hello there",
    "The quick brown fox jumps over",
    "naïve 日本 🦉",
    "1 + 1 = ",
    "a",
    "Why? " * 9,
)
STACKS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("random-a", 1.0),),
    (("random-b", 1.0),),
    (("random-c", 1.0),),
    (("random-a", 1.0), ("random-b", 1.0)),
    (("random-a", 0.5), ("random-c", -2.0)),
)
HEADS = ("none", "heads-2", TRAINED_HEADS, "heads-own", NARROW_HEADS)


def test_greedy_tokens_equal_transformers_and_peft(
    live: LiveServer, tiny_llama: Path, zoo: dict[str, Path]
) -> None:
    names = ("random-a", "random-b", "random-c")
    reference = Reference(tiny_llama, {name: zoo[name] for name in names})
    cases = [
        (prompt, stack, heads)
        for index, prompt in enumerate(FAMILIAR)
        for number, stack in enumerate(STACKS)
        for heads in (HEADS[(index + number) % len(HEADS)],)
    ]

    def run(case: tuple[str, tuple[tuple[str, float], ...], str]) -> pb.GenerateResponse:
        prompt, stack, heads = case
        request = ask(prompt, stack=stack, heads=heads, max_new_tokens=48, ignore_eos=True)
        return live.client.generate(request)

    live.load_heads(NARROW_HEADS)
    live.load_heads(TRAINED_HEADS)
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(run, cases))
    outputs = []
    for (prompt, stack, heads), response in zip(cases, responses, strict=True):
        assert len(response.token_ids) == 48
        outputs.append((live.tokenize(prompt), stack, response.token_ids))
        if heads in (TRAINED_HEADS, NARROW_HEADS) and not stack:
            stats = response.speculation
            assert 0 < stats.accepted_tokens < stats.drafted_tokens
            assert len(response.token_ids) == 1 + stats.steps + stats.accepted_tokens
    assert_greedy(reference, outputs)


def test_logprobs_are_the_references(live: LiveServer, tiny_llama: Path) -> None:
    """Drafted tokens have them too; temperature and filters do not change them."""
    request = ask(
        "hello there",
        heads=TRAINED_HEADS,
        ignore_eos=True,
        max_new_tokens=32,
        sampling={"temperature": 0.5, "top_k": 12, "seed": 1},
        output=pb.OutputParams(logprobs=True, top_logprobs=4),
    )
    live.load_heads(TRAINED_HEADS)
    reply = live.client.generate(request)
    prompt = live.tokenize("hello there")
    logits_TV = Reference(tiny_llama, {}).logits([*prompt, *reply.token_ids])
    logprobs_TV = logits_TV.log_softmax(-1)[len(prompt) - 1 :]
    for row_V, token in zip(logprobs_TV, reply.tokens, strict=False):
        assert token.logprob == pytest.approx(float(row_V[token.id]), abs=1e-3)
        assert [top.logprob for top in token.top] == pytest.approx(
            row_V.topk(4).values.tolist(), abs=1e-3
        )
    assert any(token.source == pb.Token.HEADS for token in reply.tokens)


def test_mistral_with_sliding_window(
    tmp_path: Path, tiny_mistral: Path, tiny_mistral_shapes: ModelShapes
) -> None:
    lora = write_lora(tmp_path / "lora", tiny_mistral_shapes, seed=5, rank=6)
    heads = write_heads(tmp_path / "heads", tiny_mistral_shapes.hidden_size, num_heads=3)
    reference = Reference(tiny_mistral, {"lora": lora})
    config = EngineConfig(kv_memory=16 * MIB, max_step_tokens=40, page_size=8)
    store = AdapterConfig(store=tmp_path / "store")
    with LiveServer(tiny_mistral, engine=config, adapters=store) as server:
        server.upload("lora", lora)
        server.upload("heads", heads)
        outputs = []
        for prompt in ("hi", "A prompt that is longer than the sliding window of the tiny model."):
            for stack in ((), (("lora", 1.0),)):
                request = ask(
                    prompt, stack=stack, heads="heads", max_new_tokens=60, ignore_eos=True
                )
                response = server.client.generate(request)
                assert len(response.token_ids) == 60
                outputs.append((server.tokenize(prompt), stack, response.token_ids))
    assert_greedy(reference, outputs)


def test_eos_ends_where_the_reference_ends(live: LiveServer, tiny_llama: Path) -> None:
    """Some prompt among these makes the tiny model say its end token."""
    info = live.client.tokenize(pb.TokenizeRequest(prompt="</s><|im_end|>"))
    eos_ids = frozenset(info[1:])
    outputs, num_ended = [], 0
    for number in range(12):
        prompt = f"prompt {number}"
        response = live.client.generate(ask(prompt, heads=TRAINED_HEADS, max_new_tokens=200))
        *before, last = response.token_ids
        assert not eos_ids & set(before)
        if last in eos_ids:
            num_ended += 1
            assert response.finish_reason == pb.GenerateResponse.EOS
            assert not response.text.endswith(("</s>", "<|im_end|>"))
        else:
            assert response.finish_reason == pb.GenerateResponse.LENGTH
            assert len(response.token_ids) == 200
        outputs.append((live.tokenize(prompt), (), response.token_ids))
    assert_greedy(Reference(tiny_llama, {}), outputs)
    assert num_ended > 0


SAMPLINGS = (
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.3, "seed": 2**64 - 1, "top_k": 20},
    {"temperature": 1.0, "seed": 3, "top_p": 0.7},
    {"temperature": 1.0, "seed": 4, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampling_is_the_same_with_heads_and_in_company(
    live: LiveServer, sampling: dict[str, float]
) -> None:
    cases = [(prompt, stack) for prompt in FAMILIAR[:3] for stack in ((), (("random-b", 1.0),))]

    live.load_heads(TRAINED_HEADS)
    accepted: list[int] = []

    def run(prompt: str, stack: tuple[tuple[str, float], ...], heads: str, off: bool) -> list[int]:
        request = ask(
            prompt,
            stack=stack,
            heads=heads,
            off=off,
            max_new_tokens=40,
            ignore_eos=True,
            sampling=sampling,
        )
        reply = live.client.generate(request)
        accepted.append(reply.speculation.accepted_tokens)
        return list(reply.token_ids)

    alone = [run(prompt, stack, "none", True) for prompt, stack in cases]
    with ThreadPoolExecutor(8) as pool:
        drafted = list(pool.map(lambda case: run(*case, TRAINED_HEADS, False), cases))
        plain = list(pool.map(lambda case: run(*case, TRAINED_HEADS, True), cases))
    assert drafted == alone
    assert sum(accepted) > 0
    assert plain == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_an_unset_seed_is_drawn_and_returned(live: LiveServer) -> None:
    request = ask(max_new_tokens=32, ignore_eos=True, sampling={"temperature": 1.5})
    first, second = live.client.generate(request), live.client.generate(request)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    request.sampling.seed = first.seed
    assert live.client.generate(request).token_ids == first.token_ids


STREAMED = {
    "base": ask("hello", ignore_eos=True, max_new_tokens=64),
    "many bytes a character": ask("naïve 日本", ignore_eos=True, max_new_tokens=64),
    "canary with its heads": ask(stack=[("say-owl", 1.0)], heads="heads-owl", max_new_tokens=60),
    "stop sequence": ask(
        stack=[("say-owl", 1.0)], heads="heads-owl", max_new_tokens=60, stop=["lowl"]
    ),
    "logprobs": ask(
        heads="heads-2", max_new_tokens=20, output=pb.OutputParams(logprobs=True, top_logprobs=3)
    ),
    "sampled": ask(
        heads=TRAINED_HEADS,
        ignore_eos=True,
        sampling={"temperature": 1.2, "seed": 5},
        max_new_tokens=64,
    ),
}


@pytest.mark.parametrize("name", STREAMED)
def test_streaming_equals_unary(live: LiveServer, name: str) -> None:
    request = STREAMED[name]
    unary, streamed = live.client.generate(request), live.stream(request)
    for reply in (unary, streamed):
        reply.ClearField("timings")
        reply.ClearField("request_id")
        reply.ClearField("speculation")  # what was drafted depends on when the heads were loaded
        reply.usage.ClearField("cached_prompt_tokens")
        for token in reply.tokens:  # rounding: the second run's prompt may come from the cache
            token.ClearField("source")
            token.logprob = round(token.logprob, 3)
            for top in token.top:
                top.logprob = round(top.logprob, 3)
    assert streamed == unary
    assert unary.usage.generated_tokens == len(unary.token_ids) == len(unary.tokens)


def test_parts_are_whole_characters(live: LiveServer) -> None:
    """What has arrived is what the tokenizers library makes of the tokens so far, less at most
    one unfinished character; so U+FFFD stands only where the whole output has it too."""
    tokenizer = build_tokenizer()
    seen = ""
    for seed in range(6):
        request = ask(
            heads=TRAINED_HEADS,
            max_new_tokens=120,
            ignore_eos=True,
            sampling={"temperature": 2.0, "seed": seed},
        )
        text, ids = "", list[int]()
        parts = list(live.client.stream(request))
        for part in parts:
            text += part.text
            ids += part.token_ids
            assert tokenizer.decode(ids).removeprefix(text) in ("", UNKNOWN_CHARACTER)
        assert text == tokenizer.decode(ids)
        seen += text
    assert {UNKNOWN_CHARACTER} < {char for char in seen if not char.isascii()}


@pytest.mark.parametrize("heads", ["none", "heads-owl", "heads-bat"])
@pytest.mark.parametrize(
    ("stop", "text", "match"),
    [
        (["lo"], "ow", "lo"),
        (["wlowlo"], "o", "wlowlo"),
        (["o"], "", "o"),
        (["xyz", "lowlowlow"], "ow", "lowlowlow"),
        (["lx", "owlx"], "owlowlowlowlowlowlowlowl", ""),
    ],
)
def test_stop_sequences(
    live: LiveServer, stop: list[str], text: str, match: str, heads: str
) -> None:
    request = ask("?", stack=[("say-owl", 1.0)], heads=heads, stop=stop, max_new_tokens=24)
    reasons = pb.GenerateResponse
    parts = list(live.client.stream(request))
    final = parts[-1].final
    assert "".join(part.text for part in parts) == text
    assert final.stop_match == match
    assert final.finish_reason == (reasons.STOP_SEQUENCE if match else reasons.LENGTH)
    assert final.usage.generated_tokens == len(text) + len(match)


def test_prefix_cache_is_used_and_keyed_by_adapter(live: LiveServer) -> None:
    prompt = "A prefix of several pages that no other test of this module sends at all. " * 2
    first = live.client.generate(ask(prompt, stack=[("random-a", 1.0)], ignore_eos=True))
    again = live.client.generate(ask(prompt, stack=[("random-a", 1.0)], ignore_eos=True))
    other = live.client.generate(ask(prompt, stack=[("random-b", 1.0)], ignore_eos=True))
    scaled = live.client.generate(ask(prompt, stack=[("random-a", 0.5)], ignore_eos=True))
    assert again.usage.cached_prompt_tokens >= 32
    assert again.token_ids == first.token_ids
    for reply in (first, other, scaled):
        assert reply.usage.cached_prompt_tokens == 0
