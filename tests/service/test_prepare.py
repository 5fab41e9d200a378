"""From a call to a request: text to tokens, heads that draft, grammars, room in the context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.store.registry import Registry
from lorastack.errors import InvalidArgumentError, NotFoundError, Reason
from lorastack.layout import ModelShapes
from lorastack.request import SamplingParams, SpeculationParams, StopParams
from lorastack.service.calls.call import Chat, GenerateCall, Ids, Rendered, Text
from lorastack.service.calls.prepare import Preparer
from lorastack.service.calls.served import TEXT_SLACK
from lorastack.service.edge import limits
from lorastack.text.grammar import JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import build_tokenizer, write_tokenizer
from tests.service.fakes import MAX_CONTEXT, served_model
from tests.text.test_grammar import spaces_backend

CALL = GenerateCall(
    request_id="id",
    input=Text("hello"),
    loras=(),
    medusa_id="",
    sampling=SamplingParams(),
    seeded=False,
    max_new_tokens=None,
    stop=StopParams(max_new_tokens=0),
    speculation=SpeculationParams(),
    num_logprobs=None,
    return_prompt=False,
)


@pytest.fixture(scope="module")
def preparer(registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> Preparer:
    return preparer_of(registry, tokenizer, shapes)


def preparer_of(registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> Preparer:
    model = served_model(tokenizer, shapes)
    return Preparer(model, Catalogue(model, registry, ""))


def prepare(preparer: Preparer, **fields: Any) -> Any:
    return preparer.prepare(replace(CALL, **fields), None).request


def test_a_prompts_list_is_bounded(preparer: Preparer) -> None:
    """Counted with its likely tokens, before anything runs."""
    room = limits.MAX_PROMPT_LOGPROBS
    limits.check_prompt_logprobs(room // 21, 20)
    for num_prompt, num_top in ((room // 21 + 1, 20), (room + 1, 0)):
        with pytest.raises(InvalidArgumentError) as refusal:
            limits.check_prompt_logprobs(num_prompt, num_top)
        assert refusal.value.reason is Reason.REQUEST_TOO_LARGE
    assert prepare(preparer, num_prompt_logprobs=20).num_prompt_logprobs == 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_PROMPT_LOGPROBS", 20)
        with pytest.raises(InvalidArgumentError, match="log-probabilities"):
            prepare(preparer, num_prompt_logprobs=20)


def test_heads_that_may_not_draft_are_checked_and_not_used(preparer: Preparer) -> None:
    off = SpeculationParams(enabled=False)
    assert prepare(preparer, medusa_id="heads").heads.medusa_id == "heads"
    assert prepare(preparer, medusa_id="heads", speculation=off).heads is None
    with pytest.raises(NotFoundError):
        prepare(preparer, medusa_id="nobody", speculation=off)


def test_chats_become_text_once(preparer: Preparer, tokenizer: Tokenizer) -> None:
    chat = Chat((("user", "hello"),))
    assert preparer.encode(chat) == tuple(tokenizer.chat(chat.messages))
    assert preparer.encode(Rendered("HELLO")) == tuple(tokenizer.encode_part("HELLO"))


def test_text_that_cannot_fit_is_not_tokenised(
    preparer: Preparer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its bytes: a token stands for so many of them at most."""
    most = MAX_CONTEXT * tokenizer.longest_token + TEXT_SLACK
    assert tokenizer.longest_token >= len("<|im_start|>")
    for given in (Text("é" * (most // 2 + 1)), Rendered("a" * (most + 1))):
        with monkeypatch.context() as patch, pytest.raises(InvalidArgumentError) as caught:
            patch.setattr(Tokenizer, "_encode", None)
            preparer.encode(given)
        assert caught.value.reason is Reason.REQUEST_TOO_LARGE
    assert len(preparer.encode(Text("a" * most))) > MAX_CONTEXT


def test_the_output_must_fit_the_context(preparer: Preparer) -> None:
    room = MAX_CONTEXT - 10
    prompt = Ids((5,) * 10)
    assert prepare(preparer, input=prompt).stop.max_new_tokens == room
    assert prepare(preparer, input=prompt, max_new_tokens=room).stop.max_new_tokens == room
    for fields in (
        {"input": prompt, "max_new_tokens": room + 1},
        {"input": Ids((5,) * MAX_CONTEXT)},
        {"input": Text("a " * 2 * MAX_CONTEXT)},
    ):
        with pytest.raises(InvalidArgumentError, match=str(MAX_CONTEXT)) as caught:
            prepare(preparer, **fields)
        assert caught.value.reason is Reason.REQUEST_TOO_LARGE
    assert prepare(preparer, input=Ids((5,) * (MAX_CONTEXT - 1))).stop.max_new_tokens == 1


def test_seeds(preparer: Preparer) -> None:
    hot = SamplingParams(temperature=1.0)
    drawn = {prepare(preparer, sampling=hot).sampling.seed for _ in range(8)}
    assert len(drawn) == 8
    assert max(drawn) >= 1 << 32  # 64 bits of it
    assert prepare(preparer, sampling=hot, seeded=True).sampling.seed == 0
    assert prepare(preparer).sampling.seed == 0  # greedy needs none


def test_grammars_are_compiled_once(preparer: Preparer, tokenizer: Tokenizer) -> None:
    assert prepare(preparer).grammar is None
    grammar = prepare(preparer, response_format=Regex("the end")).grammar
    text = tokenizer.decode(grammar.matcher().forced(99))
    assert text == "the end"
    assert prepare(preparer, response_format=Regex("the end")).grammar is grammar
    with pytest.raises(InvalidArgumentError, match="line 1 column 1") as refusal:
        prepare(preparer, response_format=JsonSchema("["))
    assert refusal.value.reason is Reason.INVALID_GRAMMAR


def test_the_prompts_text(preparer: Preparer, tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode("some text"))
    for given, text in ((Text("a b"), "a b"), (Ids(ids), "some text")):
        call = replace(CALL, input=given, return_prompt=True)
        assert preparer.prepare(call, None).prompt == text
    assert preparer.prepare(CALL, None).prompt == ""


@pytest.mark.parametrize(
    "given",
    [Text("hello <pad>"), Chat((("user", "<pad>"),)), Text("<pad>"), Chat((("<pad>", "x"),))],
)
def test_a_token_that_the_model_lacks_is_refused_by_name(
    registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes, tmp_path: Path, given: Any
) -> None:
    write_tokenizer(tmp_path)
    backend = build_tokenizer()
    backend.add_special_tokens(["<pad>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    longer = Tokenizer.load(tmp_path)
    assert longer.vocab_size == shapes.vocab_size + 1
    preparer = preparer_of(registry, longer, shapes)
    prepare(preparer, input=Text("hello"))
    with pytest.raises(InvalidArgumentError, match=rf"'<pad>' \(id {shapes.vocab_size}\)"):
        prepare(preparer, input=given)
    # Nor does a grammar ever allow it.
    matcher = prepare(preparer, response_format=Regex("(?s:.)*")).grammar.matcher()
    mask = int.from_bytes(matcher.mask(), "little")
    assert not mask >> shapes.vocab_size & 1 and mask >> shapes.vocab_size - 1 & 1


def test_the_text_of_a_grammar_is_the_one_behind_the_prompt(
    registry: Registry, shapes: ModelShapes
) -> None:
    """SentencePiece drops the space before a first word, behind a prompt with text none."""
    backend = spaces_backend()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    preparer = preparer_of(registry, Tokenizer(fast, frozenset({2}), ""), shapes)
    space, word = (backend.token_to_id(token) for token in ("▁", "▁a"))
    for prompt, is_begun in (((word,), True), ((word, 1), True), ((1,), False)):
        grammar = prepare(preparer, input=Ids(prompt), response_format=Regex(" a")).grammar
        matcher = grammar.matcher()
        matcher.commit((space,) * (not is_begun))
        matcher.commit((word,))
        assert matcher.finished
    half = (word, backend.token_to_id("<0xE4>"))
    with pytest.raises(InvalidArgumentError, match="inside a character"):
        prepare(preparer, input=Ids(half), response_format=Regex(" a"))
    prepare(preparer, input=Ids((*half, word)), response_format=Regex(" a"))
