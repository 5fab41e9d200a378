"""States that come with tokens are those of one plain forward pass, whatever the engine did."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorastack.adapters.store.ids import NO_HEADS
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
)
from lorastack.layout import ModelShapes
from lorastack.request import (
    FinishReason,
    Request,
    SamplingParams,
    SpeculationParams,
    StopParams,
)
from lorastack.startup.files import ModelFiles
from lorastack.train.local import LocalEngine, Reply, Selection
from lorastack.train.prompts import Prompt
from tests.helpers.adapters import write_heads, write_private
from tests.helpers.reference import Reference, Stack
from tests.service.fakes import store as put
from tests.train.conftest import FAMILIAR, ROOMY, TIGHT, OpenTiny

STACK = (("lora-a", 1.0), ("lora-b", 0.5))
LONG = "The quick brown fox jumps over the lazy dog. " * 3  # several chunks of a prompt
TEXTS = (*FAMILIAR, LONG, LONG + "And then?", *FAMILIAR, LONG)  # some find their prefix cached


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, adapter_folders: dict[str, Path]) -> Reference:
    return Reference(tiny_llama, {name: adapter_folders[name] for name, _ in STACK})


def requests(
    engine: LocalEngine,
    selection: Selection,
    *,
    sampling: SamplingParams | None = None,
    max_new_tokens: int = 40,
    drafts: bool = True,
    stop_token_ids: frozenset[int] = frozenset(),
) -> list[Request]:
    return [
        Request(
            request_id=str(number),
            prompt_ids=tuple(engine.model.tokenizer.encode(text)),
            sampling=sampling or SamplingParams(),
            stop=StopParams(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids),
            speculation=SpeculationParams(enabled=drafts),
            loras=selection.loras,
            heads=selection.heads if drafts else None,
            capture_states=True,
        )
        for number, text in enumerate(TEXTS)
    ]


def check_states(reference: Reference, replies: Sequence[Reply], stack: Stack = ()) -> None:
    """Each token's state and, of greedy rows, that the token is the best there."""
    for reply in replies:
        prompt, answer = reply.request.prompt_ids, [token.id for token in reply.tokens]
        at = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
        states_TH = reply.states_TH
        assert states_TH is not None and len(states_TH) == len(answer)
        wanted_TH = reference.states([*prompt, *answer], stack)[at]
        torch.testing.assert_close(states_TH, wanted_TH, atol=2e-5, rtol=2e-5)
        if reply.request.sampling.greedy:
            logits_TV = reference.logits([*prompt, *answer], stack)[at]
            assert logits_TV.argmax(1).tolist() == answer


def accepted(replies: Sequence[Reply]) -> int:
    return sum(reply.final.speculation.accepted.total() for reply in replies)


@pytest.mark.parametrize(
    ("options", "stack"),
    [
        ({"backend": "torch"}, ()),
        ({"backend": "torch"}, STACK),
        ({"backend": "native"}, ()),
        ({"backend": "native"}, STACK),
        ({"tensor_parallel": 2}, STACK),
    ],
)
def test_states_of_trees_preempted_rows_and_chunks(
    open_tiny: OpenTiny, reference: Reference, options: dict[str, Any], stack: Stack
) -> None:
    assert TIGHT.kv_memory is not None
    share = TIGHT.kv_memory // options.get("tensor_parallel", 1)
    with open_tiny(replace(TIGHT, kv_memory=share), **options) as engine:
        selection = engine.select(stack, "heads")
        replies = list(engine.run(requests(engine, selection)))
        assert engine.num_preemptions > 0
        assert len(replies) == len(TEXTS)
        assert accepted(replies) > 0
        check_states(reference, replies, stack)


def test_drafts_and_neighbours_change_no_bit(open_tiny: OpenTiny) -> None:
    """What the native kernels promise of tokens holds for states."""
    with open_tiny(TIGHT, backend="native") as engine:
        selection = engine.select(STACK, "heads")
        together = list(engine.run(requests(engine, selection)))
        alone = [
            next(engine.run([request])) for request in requests(engine, selection, drafts=False)[:4]
        ]
    assert accepted(together) > 0 == accepted(alone)
    by_id = {reply.request.request_id: reply for reply in together}
    for reply in alone:
        other = by_id[reply.request.request_id]
        assert [token.id for token in other.tokens] == [token.id for token in reply.tokens]
        assert other.states_TH is not None and reply.states_TH is not None
        assert torch.equal(other.states_TH, reply.states_TH)


def test_states_end_where_a_row_ends(open_tiny: OpenTiny, reference: Reference) -> None:
    with open_tiny() as engine:
        selection = engine.select((), "heads")
        whole = list(engine.run(requests(engine, selection)))
        ends = frozenset(token.id for reply in whole for token in reply.tokens[5:20:3])
        replies = list(engine.run(requests(engine, selection, stop_token_ids=ends)))
    assert {reply.final.finish_reason for reply in replies} == {FinishReason.STOP_TOKEN}
    check_states(reference, replies)


def test_sampled_rows(open_tiny: OpenTiny, reference: Reference) -> None:
    with open_tiny() as engine:
        selection = engine.select((), "heads")
        sampling = SamplingParams(temperature=0.8, seed=5)
        replies = list(engine.run(requests(engine, selection, sampling=sampling)))
        assert any(reply.final.cached_prompt_tokens for reply in replies)
        check_states(reference, replies)


def test_rows_that_capture_nothing_get_nothing(open_tiny: OpenTiny) -> None:
    with open_tiny() as engine:
        first, *_ = requests(engine, Selection())
        plain = Request(
            request_id="plain",
            prompt_ids=first.prompt_ids,
            sampling=SamplingParams(),
            stop=StopParams(max_new_tokens=3),
        )
        found = {reply.request.request_id: reply.states_TH for reply in engine.run([plain, first])}
    assert found["plain"] is None
    assert found["0"] is not None


def test_requests_are_taken_as_there_is_room(open_tiny: OpenTiny) -> None:
    taken = 0

    def counted(engine: LocalEngine) -> Iterator[Request]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield Request(
                request_id=str(number),
                prompt_ids=(5, 6, 7),
                sampling=SamplingParams(),
                stop=StopParams(max_new_tokens=2 + number % 3),
            )

    with open_tiny() as engine:
        for ended, _ in enumerate(engine.run(counted(engine))):
            assert taken - ended <= 2 * ROOMY.max_rows + 1
    assert taken == 60


def test_a_closed_run_leaves_nothing_behind(open_tiny: OpenTiny) -> None:
    with open_tiny() as engine:
        replies = engine.run(requests(engine, Selection(), max_new_tokens=30))
        next(replies)
        replies.close()
        again = list(engine.run(requests(engine, Selection(), max_new_tokens=4)))
        assert sorted(int(reply.request.request_id) for reply in again) == list(range(len(TEXTS)))


def test_a_row_that_fails_fails_the_run(
    open_tiny: OpenTiny, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    with open_tiny() as engine:
        wild = engine.select([("lora-b", 1e39)], NO_HEADS)
        with pytest.raises(InternalError, match="non-finite logits with lora-b"):
            list(engine.run(requests(engine, wild)))
        assert len(list(engine.run(requests(engine, Selection(), max_new_tokens=2)))) == len(TEXTS)


def test_selections(open_tiny: OpenTiny) -> None:
    with open_tiny() as engine:
        base = engine.select()
        assert base.heads is not None and base.heads.medusa_id == "heads"  # the store's default
        assert engine.select((), NO_HEADS) == Selection()
        alias = engine.select([("both", 1.0)])
        assert alias == engine.select(STACK, "heads")
        assert {(use.lora_id, use.scale) for use in alias.loras} == set(STACK)
        assert engine.select([("loud", 1.0)]).template is not None
        assert engine.select([("loud", 1.0), ("lora-a", 1.0)]).template is None
        with pytest.raises(NotFoundError, match="nobody"):
            engine.select([("nobody", 1.0)])
        with pytest.raises(InvalidArgumentError, match="heads"):
            engine.select([("heads", 1.0)])


def test_what_was_selected_survives_its_store(
    open_tiny: OpenTiny, reference: Reference, adapter_folders: dict[str, Path]
) -> None:
    """Adapters of folders serve as those of a store do."""
    with open_tiny(with_store=False) as engine:
        with pytest.raises(NotFoundError):
            engine.select([("lora-a", 1.0)])
        lora = engine.add_folder(adapter_folders["lora-a"])
        heads = engine.add_folder(adapter_folders["heads"])
        assert [use.lora_id for use in lora.loras] == ["lora-a"] and lora.heads is None
        assert heads.heads is not None and heads.heads.medusa_id == "heads"
        both = Selection(loras=lora.loras, heads=heads.heads)
        check_states(reference, list(engine.run(requests(engine, both))), [("lora-a", 1.0)])
        with pytest.raises((InvalidArgumentError, NotFoundError)):
            engine.add_folder(adapter_folders["both"].parent)


@pytest.fixture
def parts(
    tmp_path: Path,
    tiny_llama: Path,
    tiny_llama_shapes: ModelShapes,
    adapter_folders: dict[str, Path],
) -> Iterator[Registry]:
    """A store with heads, a private part of them, and a bundle whose heads are such a part."""
    registry, heads = Registry(tmp_path / "parts"), adapter_folders["heads"]
    bundle = shutil.copytree(adapter_folders["lora-a"], tmp_path / "bundle")
    for adapter_id, folder in (
        ("heads", heads),
        ("part", write_private(tmp_path / "part", heads)),
        ("bundle", write_private(bundle, heads, seed=1)),
    ):
        put(registry, adapter_id, folder, tiny_llama_shapes, ModelFiles(tiny_llama).fingerprint())
    yield registry
    registry.close()


def test_a_bundle_of_a_private_part(
    open_tiny: OpenTiny, parts: Registry, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    """Its LoRA serves alone, with its own heads, and with others."""
    for medusa_id in (NO_HEADS, "", "part", "heads"):
        with open_tiny(store_at=tmp_path / "parts") as engine:
            found = engine.select([("bundle", 1.0)], medusa_id)
            assert [use.digest for use in found.loras] == [parts.resolve("bundle").digest]
            wanted = {"": "bundle"}.get(medusa_id, medusa_id)
            assert ("none" if found.heads is None else found.heads.medusa_id) == wanted
            assert len(list(engine.run(requests(engine, found, max_new_tokens=3)))) == len(TEXTS)
    with open_tiny(store_at=tmp_path / "parts") as engine:
        own = engine.add_folder(tmp_path / "bundle")
        assert own.heads is not None and own.heads.shared_digest == parts.resolve("heads").digest


def test_a_folders_private_part_finds_its_heads_by_their_weights(
    open_tiny: OpenTiny,
    parts: Registry,
    tmp_path: Path,
    tiny_llama: Path,
    tiny_llama_shapes: ModelShapes,
    adapter_folders: dict[str, Path],
) -> None:
    """The id that it names has other heads by now, or none at all; or it is no id."""
    fingerprint = ModelFiles(tiny_llama).fingerprint()
    other = write_heads(tmp_path / "other", tiny_llama_shapes.hidden_size, seed=5)
    digest = parts.resolve("heads").digest
    strange = write_private(tmp_path / "strange", adapter_folders["heads"], shared_id=NO_HEADS)
    put(parts, "heads", other, tiny_llama_shapes, fingerprint)  # the first ones: a revision
    with open_tiny(store_at=tmp_path / "parts") as engine:
        for name in ("part", "strange"):
            found = engine.add_folder(tmp_path / name).heads
            assert found is not None and found.shared_digest == digest
            engine.load(found)
    put(parts, "moved", adapter_folders["heads"], tiny_llama_shapes, fingerprint)
    parts.delete("heads")
    with open_tiny(store_at=tmp_path / "parts") as engine:
        found = engine.add_folder(strange).heads
        assert found is not None and found.shared_digest == digest
    parts.delete("moved")
    with open_tiny(store_at=tmp_path / "parts") as engine:
        with pytest.raises(FailedPreconditionError, match="private part of the heads 'none'"):
            engine.add_folder(strange)
        engine.add_folder(adapter_folders["heads"])
        engine.add_folder(strange)


def test_prompts_become_tokens(open_tiny: OpenTiny) -> None:
    chat = Prompt(0, 1, (("user", "the sun"),), is_text=False)
    with open_tiny() as engine:
        tokenizer = engine.model.tokenizer
        ids = engine.encode(chat, Selection())
        assert ids == tuple(tokenizer.chat(chat.messages))
        assert ids == engine.encode(Prompt(0, 1, chat.messages, is_text=True), Selection())
        loud = engine.encode(chat, engine.select([("loud", 1.0)]))
        assert loud == tuple(tokenizer.encode_part("THE SUN"))
        bad = Selection(template="{{ raise_exception('no') }}")
        with pytest.raises(InvalidArgumentError, match="refused the messages"):
            engine.encode(chat, bad)


def test_a_model_without_a_template_takes_texts(open_tiny: OpenTiny, tmp_path: Path) -> None:
    with open_tiny() as engine:
        tokenizer = engine.model.tokenizer
        tokenizer._hf.chat_template = None
        ids = engine.encode(Prompt(0, 1, (("user", "the sun"),), is_text=True), Selection())
        assert ids == tuple(tokenizer.encode("the sun"))
        with pytest.raises(InvalidArgumentError, match="no chat template"):
            engine.encode(Prompt(0, 1, (("user", "the sun"),), is_text=False), Selection())


def test_a_store_that_is_none(open_tiny: OpenTiny, tmp_path: Path, tiny_llama: Path) -> None:
    from lorastack.config import AdapterConfig, ModelConfig
    from lorastack.train.local import open_engine

    adapters = AdapterConfig(store=tmp_path / "none")
    with (
        pytest.raises(FailedPreconditionError, match="is not a store"),
        open_engine(ModelConfig(model=str(tiny_llama)), ROOMY, adapters),
    ):
        pass
