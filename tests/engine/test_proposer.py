"""What the runner drafts: each row by its own heads, of either version, in one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorastack.adapters.formats.parse import parse
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.engine.batch import Batch, RowAdapters, RowHeads, RowStep
from lorastack.engine.runner import Runner
from lorastack.engine.views import make_views
from lorastack.kernels.heads import HeadsGroup, TopTokens
from lorastack.kernels.native.isa import Isa
from lorastack.layout import HEADS, LM_HEAD, MAX_RANK, AdapterLayout, ModelShapes, Part
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache
from lorastack.request import LoraUse, Request, SamplingParams, StopParams
from lorastack.speculation.proposal import Proposal
from tests.helpers.adapters import (
    merged_heads,
    with_outputs,
    write_draft_vocabulary,
    write_heads,
    write_lora,
    write_private,
)
from tests.helpers.isas import FLOAT32, each_of
from tests.helpers.packed import pack, read_tensors

CPU = torch.device("cpu")
PAGE_SIZE = 16
NARROW = range(0, 200, 2)  # tokens that "two-narrow" chooses from
ODD = range(1, 180, 2)  # those of its private part "two-narrow+own", and of "two+own"

Ids = tuple[tuple[int, ...], ...]


def on_device(folder: Path, backend: Backend, lm_head_VH: Tensor) -> DeviceAdapter:
    shapes = backend.shapes
    parsed = parse({path.name: path for path in folder.iterdir()}, shapes)
    tensors, vocabulary = read_tensors(parsed), parsed.draft_vocabulary
    if vocabulary:
        tensors[0, HEADS, Part.DRAFT] = lm_head_VH[list(vocabulary)]
    layout, buffer = pack(tensors, parsed.scales, parsed.facts.num_heads, torch.float32, vocabulary)
    return adapter_of(folder.name, backend, buffer, layout)


def adapter_of(
    digest: str, backend: Backend, buffer: Tensor, layout: AdapterLayout
) -> DeviceAdapter:
    views = make_views(backend, digest, buffer, layout)
    return DeviceAdapter(digest=digest, buffer=buffer, layout=layout, views=views)


class Drafts:
    """Rows that have just read their prompt, each in a page of its own."""

    def __init__(self, model: Path, shapes: ModelShapes, root: Path, isa: Isa | None) -> None:
        """isa: what runs them; None: plain torch."""
        self.backend = load_backend(
            model,
            device=CPU,
            dtype=torch.float32,
            max_context=None,
            native=isa is not None,
            at_most=isa,
        )
        self._runner = Runner(self.backend, self.backend.make_kv(16, PAGE_SIZE))
        self._shapes = shapes
        output_VH = load_file(model / "model.safetensors")["model.embed_tokens.weight"]  # tied
        hidden = shapes.hidden_size
        folders = [
            write_heads(root / "two", hidden, num_heads=3, seed=1),
            write_heads(root / "deep", hidden, num_heads=2, num_blocks=2, seed=2),
            write_heads(
                root / "own", hidden, num_heads=4, vocab_size=shapes.vocab_size, num_blocks=2
            ),
        ]
        folders += [
            with_outputs(root / f"{heads.name}-as-one", heads, output_VH) for heads in folders[:2]
        ]
        folders += [
            write_heads(root / name, hidden, num_heads=3, seed=1, draft_vocabulary=ids)
            for name, ids in (("two-wide", range(shapes.vocab_size)), ("two-narrow", NARROW))
        ]
        for name in ("two", "deep", "two-narrow"):
            whole = root / name
            parts = [write_private(root / f"{name}+{i}", whole, rank=2 + i, seed=i) for i in (1, 2)]
            folders += [merged_heads(root / f"{part.name}-merged", whole, part) for part in parts]
            folders += parts
        for name in ("two", "two-narrow"):
            part = write_private(root / f"{name}+own", root / name)
            merged = merged_heads(root / f"{part.name}-merged", root / name, part)
            for folder in (part, merged):
                write_draft_vocabulary(folder, torch.tensor(ODD))
                folders.append(folder)
        self.heads = {folder.name: on_device(folder, self.backend, output_VH) for folder in folders}
        lora = write_lora(root / "lora", shapes, targets=(LM_HEAD,))
        self.lora = on_device(lora, self.backend, output_VH)

    def row(self, number: int, heads: str, lora: bool = False) -> RowStep:
        uses = (LoraUse(lora_id="lora", digest=self.lora.digest),) if lora else ()
        prompt = (1, 40 + number, 50, 60 + number)
        return RowStep(
            request=Request(
                request_id=str(number),
                prompt_ids=prompt,
                sampling=SamplingParams(),
                stop=StopParams(max_new_tokens=9),
                loras=uses,
            ),
            token_ids=prompt,
            block_table=(number,),
            committed=0,
            num_generated=0,
            samples=True,
            tree=None,
            adapters=RowAdapters(
                loras=(self.lora,) if lora else (),
                heads=self.row_heads(heads) if heads else None,
            ),
            num_candidates=4 if heads else 0,
        )

    def row_heads(self, name: str) -> RowHeads:
        """ "two" and what "two+1" adds to it are two adapters, "two+1-merged" is one."""
        whole, plus, _ = name.partition("+")
        if plus and not name.endswith("merged"):
            return RowHeads(self.heads[whole], self.heads[name])
        return RowHeads(self.heads[name])

    def run(self, *steps: RowStep) -> list[Proposal | None]:
        found = self._runner.run(Batch(steps=steps))
        assert all(result.error is None for result in found.rows)
        self.failed = found.failed_heads
        self.heads_seconds = found.heads_seconds
        return [result.proposal for result in found.rows]

    def ids(self, *steps: RowStep) -> list[Ids | None]:
        return [each.ids if each else None for each in self.run(*steps)]


@pytest.fixture(scope="module", params=[pytest.param(None, id="torch"), *each_of(*FLOAT32)])
def drafts(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    tiny_llama_shapes: ModelShapes,
    tmp_path_factory: pytest.TempPathFactory,
) -> Drafts:
    root = tmp_path_factory.mktemp("heads")
    return Drafts(tiny_llama, tiny_llama_shapes, root, request.param)


def assert_same(found: Proposal | None, expected: Proposal | None) -> None:
    """The very ids, and log-probabilities up to rounding."""
    if found is None or expected is None:
        assert found is expected
        return
    assert found.ids == expected.ids
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("heads", ["two", "deep"])
def test_version_one_with_the_models_output_drafts_what_version_two_does(
    drafts: Drafts, heads: str
) -> None:
    for number in range(8):
        (expected,) = drafts.run(drafts.row(number, heads))
        (found,) = drafts.run(drafts.row(number, f"{heads}-as-one"))
        assert expected is not None and len(expected.ids) == drafts.heads[heads].layout.num_heads
        assert_same(found, expected)


def test_a_batch_drafts_for_each_row_what_it_gets_alone(drafts: Drafts) -> None:
    names = ["own", "two", "", "deep-as-one", "two-narrow", "deep", "own", "two-as-one", "two"]
    rows = [drafts.row(number, name) for number, name in enumerate(names)]
    alone = [drafts.run(row)[0] for row in rows]
    for found, expected in zip(drafts.run(*rows), alone, strict=True):
        assert_same(found, expected)
    for found, expected in zip(drafts.run(*reversed(rows)), alone[::-1], strict=True):
        assert_same(found, expected)
    assert [propose is None for propose in alone] == [name == "" for name in names]
    assert len({each.ids if each else None for each in alone}) == len(names)


@pytest.mark.parametrize("heads", ["two", "deep", "two-narrow"])
def test_a_private_part_drafts_what_heads_with_it_added_do(drafts: Drafts, heads: str) -> None:
    for number, name in enumerate((f"{heads}+1", f"{heads}+2", f"{heads}+1")):
        found, expected, whole = (
            drafts.run(drafts.row(number, each))[0] for each in (name, f"{name}-merged", heads)
        )
        assert_same(found, expected)
        assert found is not None and whole is not None
        assert found.ids != whole.ids


@pytest.mark.parametrize("heads", ["two", "two-narrow"])
def test_a_private_part_may_bring_a_draft_vocabulary(drafts: Drafts, heads: str) -> None:
    found, expected, whole = (
        drafts.run(drafts.row(0, name))[0]
        for name in (f"{heads}+own", f"{heads}+own-merged", heads)
    )
    assert_same(found, expected)
    assert found is not None and whole is not None
    assert {token for ranks in found.ids for token in ranks} <= set(ODD)
    assert not {token for ranks in whole.ids for token in ranks} <= set(ODD)


def test_private_parts_of_one_batch_draft_what_they_draft_alone(drafts: Drafts) -> None:
    """Two parts of the same heads, the heads themselves, parts of others, and other heads."""
    names = [
        "two+1",
        "two",
        "own",
        "two+2",
        "",
        "deep+1",
        "two-narrow+2",
        "two+1",
        "deep",
        "deep+2",
    ]
    names += ["two-narrow", "two+2", "two-narrow+1", "two-narrow+own", "two+own"]
    rows = [drafts.row(number, name) for number, name in enumerate(names)]
    rows += [drafts.row(len(rows), "two-narrow+1", lora=True)]
    alone = [drafts.run(row)[0] for row in rows]
    for found, expected in zip(drafts.run(*rows), alone, strict=True):
        assert_same(found, expected)
    for found, expected in zip(drafts.run(*reversed(rows)), alone[::-1], strict=True):
        assert_same(found, expected)
    assert len({each.ids if each else None for each in alone}) == len(rows)


def test_one_part_of_heads_that_are_stored_twice(drafts: Drafts) -> None:
    """The same weights beside different draft vocabularies: each row chooses from its own."""
    part = drafts.heads["two+1"]
    rows = [
        with_heads(drafts.row(number, "two"), RowHeads(drafts.heads[whole], part))
        for number, whole in enumerate(("two-narrow", "two-wide", "two-narrow", "two-wide"))
    ]
    alone = [drafts.run(row)[0] for row in rows]
    for found, expected in zip(drafts.run(*rows), alone, strict=True):
        assert_same(found, expected)
    for number in (0, 2):
        chosen = alone[number]
        assert chosen is not None and {each for ids in chosen.ids for each in ids} <= set(NARROW)


def test_a_failing_private_part_is_blamed_alone(drafts: Drafts) -> None:
    part = drafts.heads["two+1"]
    buffer = part.buffer.clone()
    buffer.view(torch.float32)[-20] = torch.nan
    broken = RowHeads(drafts.heads["two"], adapter_of("b", drafts.backend, buffer, part.layout))
    rows = [drafts.row(number, name) for number, name in enumerate(("two", "two+1", "two+2"))]
    expected = drafts.run(*rows)
    rows[1] = replace(rows[1], adapters=RowAdapters(loras=(), heads=broken))
    found = drafts.run(*rows)
    assert found[1] is None
    assert_same(found[0], expected[0])
    assert_same(found[2], expected[2])
    assert drafts.failed == ["b"]


def test_views_go_with_either_of_a_part_and_what_it_corrects(drafts: Drafts) -> None:
    """Either may move on the device, and is another adapter then."""
    row = drafts.row(0, "two+1")
    (expected,) = drafts.run(row)
    heads = row.adapters.heads
    assert heads is not None and heads.private is not None

    def moved(adapter: DeviceAdapter) -> DeviceAdapter:
        return adapter_of(adapter.digest, drafts.backend, adapter.buffer.clone(), adapter.layout)

    whole, private = moved(heads.whole), moved(heads.private)
    for each in (RowHeads(whole, heads.private), RowHeads(heads.whole, private)):
        assert_same(drafts.run(with_heads(row, each))[0], expected)
    whole.buffer.zero_()  # the old place holds something else now
    for each in (RowHeads(moved(heads.whole), heads.private), RowHeads(heads.whole, heads.private)):
        assert_same(drafts.run(with_heads(row, each))[0], expected)
    assert drafts.ids(with_heads(row, RowHeads(whole, private))) != [expected and expected.ids]


def with_heads(row: RowStep, heads: RowHeads) -> RowStep:
    return replace(row, adapters=replace(row.adapters, heads=heads))


def test_one_call_drafts_for_all_rows_and_only_for_those_that_want_it(
    drafts: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls if some choose through lm_head; none if nobody drafts."""
    calls: list[tuple[str, list[HeadsGroup]]] = []

    def watch(name: str) -> None:
        real = getattr(drafts.backend.ops, name)

        def watched(hidden_BH: Tensor, groups: list[HeadsGroup], *rest: int) -> object:
            assert hidden_BH.shape[0] == sum(group.end - group.start for group in groups)
            calls.append((name, groups))
            return real(hidden_BH, groups, *rest)

        monkeypatch.setattr(drafts.backend.ops, name, watched)

    watch("propose")
    watch("states")
    drafts.run(drafts.row(0, ""), replace(drafts.row(1, "own"), num_candidates=0))
    assert not calls
    names = ["own", "", "two-narrow", "deep-as-one", "own", "two-as-one"]
    rows = [drafts.row(number, name) for number, name in enumerate(names)]
    silent = replace(drafts.row(6, "own"), num_candidates=0)
    drafts.run(*rows, silent)
    ((name, groups),) = calls
    assert name == "propose"
    assert sorted(group.end - group.start for group in groups) == [1, 1, 1, 2]
    assert {group.heads.num_heads for group in groups} == {2, 3, 4}
    calls.clear()
    drafts.run(
        *rows, drafts.row(6, "two"), drafts.row(7, "deep"), drafts.row(8, "two-narrow", True)
    )
    assert sorted(name for name, _ in calls) == ["propose", "states"]


def test_what_a_backend_drafts_within_its_step_is_not_asked_again(
    drafts: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers for heads that stand alone, as far as it likes; the engine asks for the rest."""
    names = ["own", "", "two-narrow", "two", "deep-as-one", "own"]
    rows = [drafts.row(number, name) for number, name in enumerate(names)]
    expected = drafts.run(*rows)
    forward, propose = drafts.backend.forward, drafts.backend.ops.propose
    asked: list[int] = []

    def answering(batch: ForwardBatch, kv: KVCache, *rest: Any) -> Outputs:
        outputs, drafted = forward(batch, kv, *rest), list[TopTokens | None]()
        for number, tree in enumerate(batch.trees):
            top = None
            if tree.ask is not None and number != 4:
                asked.append(number)
                hidden_BH = outputs.hidden_XH[tree.first_output :][:1].contiguous()
                group = HeadsGroup(0, 1, tree.ask.heads)
                top = propose(hidden_BH, [group], tree.ask.num_candidates)
            drafted.append(top)
        return replace(outputs, drafted=drafted, heads_seconds=1e6)

    def once(hidden_BH: Tensor, groups: list[HeadsGroup], num: int) -> TopTokens:
        assert [group.heads.num_heads for group in groups] == [2]  # "deep-as-one"
        return propose(hidden_BH, groups, num)

    monkeypatch.setattr(drafts.backend, "forward", answering)
    monkeypatch.setattr(drafts.backend.ops, "propose", once)
    for mine, theirs in zip(drafts.run(*rows), expected, strict=True):
        assert_same(mine, theirs)
    assert asked == [0, 2, 5]
    assert drafts.heads_seconds > 1e6


def test_log_probabilities_are_of_what_a_head_chooses_from(drafts: Drafts) -> None:
    everything = replace(drafts.row(0, "two"), num_candidates=MAX_RANK)
    narrow = replace(drafts.row(0, "two-narrow"), num_candidates=MAX_RANK)
    full, chosen = drafts.run(everything)[0], drafts.run(narrow)[0]
    assert full and chosen
    for head in range(3):
        at = dict(zip(full.ids[head], full.logprobs[head], strict=True))
        shifts = [
            logprob - at[token]
            for token, logprob in zip(chosen.ids[head], chosen.logprobs[head], strict=True)
            if token in at
        ]
        # Fewer to choose from: each of them more likely, all by the same factor.
        assert min(shifts) > 0.01
        assert shifts == pytest.approx([shifts[0]] * len(shifts), abs=1e-4)


def broken_heads(backend: Backend, sound: DeviceAdapter) -> DeviceAdapter:
    """The same heads with a NaN among their weights."""
    buffer = sound.buffer.clone()
    buffer.view(torch.float32)[5] = torch.nan
    return adapter_of("broken", backend, buffer, sound.layout)


@pytest.mark.parametrize("heads", ["own", "two", "two-narrow"])
def test_rows_of_failing_heads_go_on_undrafted(drafts: Drafts, heads: str) -> None:
    broken = broken_heads(drafts.backend, drafts.heads[heads])
    rows = [drafts.row(number, heads) for number in range(3)]
    expected = drafts.run(*rows)
    rows[1] = replace(rows[1], adapters=RowAdapters(loras=(), heads=RowHeads(broken)))
    found = drafts.run(*rows)
    assert found[1] is None
    assert_same(found[0], expected[0])
    assert_same(found[2], expected[2])
    assert drafts.failed == ["broken"]
    drafts.run(drafts.row(0, heads))
    assert drafts.failed == []


def test_a_step_that_raises_behind_its_heads_reports_their_failure_once(
    drafts: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = broken_heads(drafts.backend, drafts.heads["own"])
    row = replace(drafts.row(0, "own"), adapters=RowAdapters(loras=(), heads=RowHeads(broken)))

    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(drafts._runner, "_result", explode)
        with pytest.raises(RuntimeError):
            drafts.run(row)
    drafts.run(row)
    assert drafts.failed == ["broken"]


def test_a_draft_vocabulary_of_all_tokens_changes_nothing(drafts: Drafts) -> None:
    for number in range(8):
        found, expected = (drafts.run(drafts.row(number, name))[0] for name in ("two-wide", "two"))
        assert_same(found, expected)


def test_heads_choose_the_best_of_their_draft_vocabulary(drafts: Drafts) -> None:
    everything = replace(drafts.row(0, "two"), num_candidates=MAX_RANK)
    full, narrow = (drafts.ids(row)[0] for row in (everything, drafts.row(0, "two-narrow")))
    assert full is not None
    assert narrow is not None
    assert narrow == tuple(tuple(token for token in ranks if token in NARROW)[:4] for ranks in full)
    assert narrow != tuple(ranks[:4] for ranks in full)


def test_heads_choose_through_an_lm_head_lora_whatever_their_vocabulary(drafts: Drafts) -> None:
    for names in (("two", "two-narrow"), ("two+own", "two-narrow+own")):
        through = [drafts.ids(drafts.row(0, heads, lora=True))[0] for heads in names]
        assert through[0] == through[1] != drafts.ids(drafts.row(0, names[1]))[0]


def test_an_lm_head_lora_changes_drafts_of_version_two_only(drafts: Drafts) -> None:
    plain = drafts.ids(*(drafts.row(0, heads) for heads in ("two", "two-as-one")))
    adapted = drafts.ids(*(drafts.row(0, heads, lora=True) for heads in ("two", "two-as-one")))
    assert plain[0] == plain[1] == adapted[1] != adapted[0]


def test_only_as_many_candidates_as_the_widest_row_asks_for(drafts: Drafts) -> None:
    rows = [replace(drafts.row(number, "own"), num_candidates=2) for number in range(2)]
    for proposal in drafts.run(*rows):
        assert proposal is not None
        assert [len(ranks) for ranks in proposal.ids] == [2] * 4
