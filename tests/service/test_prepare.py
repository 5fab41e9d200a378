"""Ids to digests, heads by rule, templates, and the room in the context."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.manifest import FileSpec, Record
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from lorastack.layout import ModelShapes
from lorastack.request import HeadsUse, SamplingParams, SpeculationParams, StopParams
from lorastack.service.prepare import (
    TEXT_SLACK,
    Chat,
    GenerateCall,
    Ids,
    Preparer,
    Rendered,
    Text,
)
from lorastack.text.grammar import JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import CHATML, build_tokenizer, write_tokenizer
from tests.service.fakes import FINGERPRINT, MAX_CONTEXT, served_model
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


def store(
    registry: Registry,
    adapter_id: str,
    folder: Path,
    shapes: ModelShapes,
    fingerprint: str = FINGERPRINT,
) -> Record:
    """What an upload does."""
    data = {path.name: path.read_bytes() for path in folder.iterdir()}
    specs = [
        FileSpec(name=name, size=len(content), sha256=sha256(content).hexdigest())
        for name, content in data.items()
    ]
    upload = registry.begin_upload(adapter_id, specs)
    for spec in specs:
        if spec.sha256 in upload.needed:
            upload.write(spec.sha256, 0, data[spec.name])

    def no_weight(name: str) -> Any:
        raise AssertionError(name)

    validate = Validator(shapes=shapes, base_names=("tiny",), base_weight=no_weight)
    return upload.commit(validate, base_fingerprint=fingerprint)


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, shapes: ModelShapes, folders: Mapping[str, Path]
) -> Registry:
    registry = Registry(tmp_path_factory.mktemp("prepare") / "store")
    for name, folder in folders.items():
        store(registry, name, folder, shapes)
    store(registry, "copy-of-lora", folders["lora"], shapes)
    return registry


@pytest.fixture(scope="module")
def preparer(registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> Preparer:
    return Preparer(served_model(tokenizer, shapes), registry, "")


def prepare(preparer: Preparer, **fields: Any) -> Any:
    return preparer.prepare(replace(CALL, **fields), None).request


def heads_of(preparer: Preparer, **fields: Any) -> str | None:
    heads: HeadsUse | None = prepare(preparer, **fields).heads
    return None if heads is None else heads.medusa_id


def test_which_heads_a_request_gets(
    preparer: Preparer, registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes
) -> None:
    with_default = Preparer(served_model(tokenizer, shapes), registry, "heads")
    lora, bundle, both = (("lora", 1.0),), (("bundle", 1.0),), (("bundle", 1.0), ("lora", 1.0))
    assert heads_of(preparer) is None
    assert heads_of(with_default) == "heads"
    assert heads_of(preparer, loras=lora) is None
    assert heads_of(with_default, loras=lora) == "heads"
    assert heads_of(preparer, loras=bundle) == "bundle"
    assert heads_of(with_default, loras=bundle) == "bundle"
    assert heads_of(preparer, loras=both) is None  # only the request's only LoRA brings its heads
    assert heads_of(with_default, loras=both) == "heads"
    assert heads_of(with_default, loras=bundle, medusa_id="none") is None
    assert heads_of(with_default, loras=bundle, medusa_id="heads") == "heads"
    assert heads_of(preparer, medusa_id="bundle") == "bundle"


def test_heads_that_may_not_draft_are_checked_and_not_used(preparer: Preparer) -> None:
    off = SpeculationParams(enabled=False)
    assert heads_of(preparer, medusa_id="heads", speculation=off) is None
    with pytest.raises(NotFoundError):
        prepare(preparer, medusa_id="nobody", speculation=off)


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"loras": (("no", 1.0),)}, NotFoundError, Reason.ADAPTER_NOT_FOUND),
        ({"medusa_id": "no"}, NotFoundError, Reason.ADAPTER_NOT_FOUND),
        ({"loras": (("heads", 1.0),)}, InvalidArgumentError, Reason.WRONG_ADAPTER_KIND),
        ({"medusa_id": "lora"}, InvalidArgumentError, Reason.WRONG_ADAPTER_KIND),
        ({"loras": (("none", 1.0),)}, InvalidArgumentError, Reason.INVALID_REQUEST),
        ({"loras": (("base", 1.0),)}, InvalidArgumentError, Reason.INVALID_REQUEST),
        ({"medusa_id": "default"}, InvalidArgumentError, Reason.INVALID_REQUEST),
        (
            {"loras": (("lora", 1.0), ("copy-of-lora", 1.0))},
            InvalidArgumentError,
            Reason.INVALID_REQUEST,
        ),
    ],
)
def test_wrong_adapters_are_refused_by_name(
    preparer: Preparer, fields: dict[str, Any], kind: type[Exception], reason: Reason
) -> None:
    with pytest.raises(kind) as caught:
        prepare(preparer, **fields)
    assert caught.value.reason is reason  # type: ignore[attr-defined]
    names = [name for name, _ in fields.get("loras", ())] or [fields["medusa_id"]]
    assert names[-1] in str(caught.value)


def test_an_adapter_of_another_base_model_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, shapes: ModelShapes, folders: Mapping[str, Path]
) -> None:
    registry = Registry(tmp_path / "store")
    store(registry, "old", folders["lora"], shapes, fingerprint="sha256:" + "00" * 32)
    preparer = Preparer(served_model(tokenizer, shapes), registry, "")
    with pytest.raises(FailedPreconditionError, match="old") as caught:
        prepare(preparer, loras=(("old", 1.0),))
    assert caught.value.reason is Reason.BASE_MODEL_DIFFERS


def test_a_stack_is_sorted_by_digest_whatever_its_order(
    preparer: Preparer, registry: Registry
) -> None:
    one = prepare(preparer, loras=(("lora", 0.5), ("other", 2.0)))
    two = prepare(preparer, loras=(("other", 2.0), ("lora", 0.5)))
    assert one.loras == two.loras
    assert [use.digest for use in one.loras] == sorted(use.digest for use in one.loras)
    assert {(use.lora_id, use.scale) for use in one.loras} == {("lora", 0.5), ("other", 2.0)}
    assert {use.digest for use in one.loras} == {
        registry.resolve("lora").digest,
        registry.resolve("other").digest,
    }


def test_a_revision_can_be_named(preparer: Preparer, registry: Registry) -> None:
    name = f"lora@{registry.resolve('lora').digest}"
    (use,) = prepare(preparer, loras=((name, 1.0),)).loras
    assert (use.lora_id, use.digest) == (name, registry.resolve("lora").digest)


def test_which_chats_need_a_loras_own_template(
    preparer: Preparer, registry: Registry, tokenizer: Tokenizer, folders: Mapping[str, Path]
) -> None:
    assert preparer.own_template("chatty") == "{{ messages[-1]['content'] | upper }}"
    assert preparer.own_template("lora") is None
    with pytest.raises(NotFoundError):
        preparer.own_template("no")
    # Read once: the store's files may be as slow as they like.
    files = registry.files(registry.resolve("chatty").digest)
    files["chat_template.jinja"].rename(files["chat_template.jinja"].with_suffix(".away"))
    try:
        assert preparer.own_template("chatty") is not None
    finally:
        files["chat_template.jinja"].with_suffix(".away").rename(files["chat_template.jinja"])


def test_a_loras_template_that_is_the_models_needs_no_worker(
    preparer: Preparer,
    registry: Registry,
    shapes: ModelShapes,
    folders: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    for name, files in {
        "same": {"chat_template.jinja": CHATML},
        "same-in-config": {"tokenizer_config.json": json.dumps({"chat_template": CHATML})},
        "named": {
            "tokenizer_config.json": json.dumps(
                {"chat_template": [{"name": "default", "template": "mine"}]}
            )
        },
    }.items():
        folder = tmp_path / name
        shutil.copytree(folders["lora"], folder)
        for file, text in files.items():
            (folder / file).write_text(text)
        store(registry, name, folder, shapes)
    assert preparer.own_template("same") is None
    assert preparer.own_template("same-in-config") is None
    assert preparer.own_template("named") == "mine"


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
    preparer = Preparer(served_model(longer, shapes), registry, "")
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
    preparer = Preparer(served_model(Tokenizer(fast, frozenset({2}), ""), shapes), registry, "")
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
