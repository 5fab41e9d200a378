"""Private parts of heads: what their folders hold, and which stored heads they correct."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.store.manifest import Manifest, Record
from lorastack.adapters.store.registry import Registry
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from lorastack.kernels.packing import allocate
from lorastack.layout import DRAFT_KEY, HEADS, AdapterKind, Part
from lorastack.speculation.heads import correction
from lorastack.startup.prior import check_acceptance
from tests.adapters.folders import (
    HEADS_CONFIG,
    HEADS_FILE,
    SHAPES,
    VALIDATE,
    Edit,
    H,
    edit_json,
    edit_tensors,
    no_copies,
    parse_folder,
    read_folder,
    refused,
    reopen,
    sha256,
    store,
)
from tests.helpers.adapters import write_draft_vocabulary, write_heads, write_lora, write_private

RANK = 3
A, B = "0.0.linear.lora_A.weight", "0.0.linear.lora_B.weight"


@pytest.fixture
def part(tmp_path: Path, heads: Path) -> Path:
    return write_private(tmp_path / "part", heads, rank=RANK)


def put(registry: Registry, adapter_id: str, folder: Path, **fields: Any) -> Record:
    return store(registry, adapter_id, read_folder(folder), validate=VALIDATE, **fields)


def shared(whole: Path) -> dict[str, str]:
    """How a part names the heads in this folder."""
    return {"id": whole.name, "sha256": sha256((whole / HEADS_FILE).read_bytes())}


# -- the folder -----------------------------------------------------------------------------------


def test_a_part_is_heads_of_small_matrices(part: Path, heads: Path) -> None:
    parsed = parse_folder(part)
    facts = parsed.facts
    assert facts.kind is AdapterKind.MEDUSA
    assert (facts.num_heads, facts.num_layers, facts.medusa_version) == (3, 1, 2)
    assert facts.private_rank == RANK
    assert facts.shared_heads is not None
    assert facts.shared_heads.id == "heads"
    assert {(key[1], key[2]) for key in parsed.tensors} == {(HEADS, Part.A), (HEADS, Part.B)}
    assert len(parsed.tensors) == 6
    assert parsed.draft_vocabulary == ()
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    assert "shared_heads" not in parse_folder(heads).facts.to_json()


def test_a_bundle_may_bring_a_part(tmp_path: Path, part: Path) -> None:
    bundle = write_lora(tmp_path / "bundle", SHAPES, rank=5)
    for path in part.iterdir():
        shutil.copy(path, bundle)
    facts = parse_folder(bundle).facts
    assert facts.kind is AdapterKind.LORA_WITH_MEDUSA
    assert (facts.rank, facts.private_rank) == (5, RANK)


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "rank 0": ({"private_rank": 0}, "private_rank = 0 .* whole number from 1 to 64"),
    "rank 65": ({"private_rank": 65}, "private_rank = 65"),
    "rank text": ({"private_rank": "3"}, "private_rank = '3'"),
    "rank true": ({"private_rank": True}, "private_rank = True"),
    "no rank": ({"private_rank": None}, "private_rank = None"),
    "another rank": ({"private_rank": 4}, r"lora_A.* shape \[3, 16\].* \[4, 16\].*rank = 4"),
    "no heads": ({"shared_heads": None}, "shared_heads in config.json must be an object of id and"),
    "heads text": ({"shared_heads": "heads"}, "must be an object of id and sha256"),
    "no id": ({"shared_heads": {"sha256": "a" * 64}}, "must be an object of id and sha256"),
    "an empty id": ({"shared_heads": {"id": "", "sha256": "a" * 64}}, "shared_heads.id"),
    "a long id": ({"shared_heads": {"id": "x" * 300, "sha256": "a" * 64}}, "shared_heads.id"),
    "no sha256": ({"shared_heads": {"id": "h"}}, "must be an object of id and sha256"),
    "a short sha256": ({"shared_heads": {"id": "h", "sha256": "a" * 63}}, "shared_heads.sha256"),
    "a great sha256": ({"shared_heads": {"id": "h", "sha256": "A" * 64}}, "lower-case hex"),
    "a digest": ({"shared_heads": {"id": "h", "sha256": "sha256:" + "a" * 57}}, "sha256 in"),
    "more": ({"shared_heads": {"id": "h", "sha256": "a" * 64, "x": 1}}, "object of id and sha256"),
    "version 1": ({"version": "1"}, "version = '1': private parts go with version 2 heads"),
    "no version": ({"version": None}, "no version: private parts go with version 2 heads"),
    "too few": ({"medusa_num_heads": 2}, "2.0.linear.* belongs to no head: .*medusa_num_heads = 2"),
    "too many": ({"medusa_num_heads": 4}, "private_rank = 3, but 3.0.linear.lora_A.weight is"),
    "layers": ({"medusa_num_layers": 2}, "medusa_num_layers = 2 .*0.1.linear.lora_A.weight is"),
    "prior text": ({"acceptance": "{}"}, "acceptance in config.json must be an object"),
    "prior list": ({"acceptance": []}, "acceptance in config.json must be an object"),
    "a long prior": ({"acceptance": {"x": "x" * 70_000}}, "of at most 65536 characters"),
}


@pytest.mark.parametrize(("fields", "named"), FIELDS.values(), ids=FIELDS.keys())
def test_fields_are_refused_by_name(part: Path, fields: dict[str, Any], named: str) -> None:
    edit_json(part / HEADS_CONFIG, **fields)
    refused(part, named)


@pytest.mark.parametrize("field", ["shared_heads", "private_rank"])
def test_half_of_the_fields_of_a_part_are_refused(part: Path, field: str) -> None:
    config = json.loads((part / HEADS_CONFIG).read_text())
    del config[field]
    (part / HEADS_CONFIG).write_text(json.dumps(config))
    refused(part, field)


TENSORS: dict[str, tuple[Edit, str]] = {
    "no A": (lambda t: t.__delitem__(A), f"but {A} is missing"),
    "no B": (lambda t: t.__delitem__(B), f"but {B} is missing"),
    "turned": (lambda t: t.update({A: t[A].T.contiguous()}), r"lora_A.*shape \[16, 3\].*\[3, 16\]"),
    "a weight": (
        lambda t: t.update({"0.0.linear.weight": torch.zeros(H, H)}),
        "0.0.linear.weight belongs to whole heads.*leave it out",
    ),
    "a bias": (
        lambda t: t.update({"0.0.linear.bias": torch.zeros(H)}),
        "0.0.linear.bias belongs to whole heads",
    ),
    "an output": (
        lambda t: t.update({"0.1.weight": torch.zeros(SHAPES.vocab_size, H)}),
        "0.1.weight belongs to whole heads",
    ),
    "a stranger": (lambda t: t.update({"x": torch.zeros(1)}), "tensor x is neither"),
}


@pytest.mark.parametrize(("edit", "named"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_are_refused_by_name(part: Path, edit: Edit, named: str) -> None:
    edit_tensors(part / HEADS_FILE, edit)
    refused(part, named)


def test_a_part_may_bring_a_draft_vocabulary(part: Path) -> None:
    write_draft_vocabulary(part, torch.arange(SHAPES.vocab_size))
    assert parse_folder(part).draft_vocabulary == tuple(range(SHAPES.vocab_size))
    write_draft_vocabulary(part, torch.arange(3))
    refused(part, r"draft_vocabulary has shape \[3\]")


def test_parts_tensors_in_whole_heads_are_refused(heads: Path, part: Path) -> None:
    a = load_file(part / HEADS_FILE)[A]
    edit_tensors(heads / HEADS_FILE, lambda tensors: tensors.update({A: a}))
    refused(heads, f"tensor {A} belongs to a private part.* no shared_heads and private_rank")


def test_values_that_are_not_finite_are_refused(part: Path) -> None:
    edit_tensors(part / HEADS_FILE, lambda tensors: tensors[B].view(-1)[2].fill_(torch.inf))
    with pytest.raises(InvalidArgumentError, match=f"tensor {B} contains NaN"):
        VALIDATE({path.name: path for path in part.iterdir()})


def test_a_prior_is_validated_and_kept(heads: Path, part: Path) -> None:
    validate = Validator(
        shapes=SHAPES,
        base_names=("tiny",),
        base_weight=no_copies,
        check_acceptance=check_acceptance,
    )
    for folder in (heads, part):
        edit_json(folder / HEADS_CONFIG, acceptance={"version": 1})
        with pytest.raises(InvalidArgumentError, match=r"acceptance in config\.json is no calib"):
            validate({path.name: path for path in folder.iterdir()})
        facts = parse_folder(folder).facts
        assert facts.acceptance == '{"version": 1}'
        assert Facts.from_json(facts.to_json()) == facts


# -- the heads that it corrects -------------------------------------------------------------------


def corrected(registry: Registry, part: Manifest) -> Record:
    assert part.facts.shared_heads is not None
    return registry.shared_heads(part.facts.shared_heads, part.base_fingerprint)


def test_a_part_needs_its_heads_in_the_store(registry: Registry, heads: Path, part: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="upload 'heads' first") as caught:
        put(registry, "part", part)
    assert caught.value.reason is Reason.SHARED_HEADS_MISSING
    assert caught.value.metadata["adapter_id"] == "heads"
    with pytest.raises(NotFoundError):
        registry.resolve("part")
    shared = put(registry, "heads", heads)
    record = put(registry, "part", part)
    assert corrected(registry, record.manifest) == shared


def test_their_weights_count_and_not_their_id(
    registry: Registry, root: Path, tmp_path: Path, heads: Path, part: Path
) -> None:
    """Newer heads under the id, another id, and heads for another base model."""
    first = put(registry, "heads", heads)
    record = put(registry, "part", part)
    other = write_heads(tmp_path / "other", H, num_heads=3, seed=9)
    put(registry, "heads", other)
    assert corrected(registry, record.manifest) == first
    put(registry, "abc", heads)  # the id that the part names goes before others
    assert corrected(registry, record.manifest) == first
    registry = reopen(registry, root)
    assert corrected(registry, registry.resolve("part").manifest) == first
    registry.delete("heads")
    assert corrected(registry, record.manifest).id == "abc"
    put(registry, "abc", other)
    registry.prune(1)  # a revision that a part corrects stays
    assert corrected(registry, record.manifest).digest == first.digest
    registry.delete("abc")
    with pytest.raises(NotFoundError, match="no heads 'heads' whose medusa_lm_head"):
        corrected(registry, record.manifest)
    put(registry, "heads", other)
    with pytest.raises(NotFoundError, match="no heads 'heads' whose medusa_lm_head"):
        corrected(registry, record.manifest)
    with pytest.raises(FailedPreconditionError, match="upload 'heads' first"):
        put(registry, "again", part)
    registry.close()


def test_heads_that_nobody_corrects_any_more_are_pruned(
    registry: Registry, tmp_path: Path, heads: Path, part: Path
) -> None:
    put(registry, "heads", heads)
    put(registry, "part", part)
    put(registry, "heads", write_heads(tmp_path / "other", H, seed=9))
    assert registry.prune(1).num_revisions == 0
    registry.delete("part")
    assert registry.prune(1).num_revisions == 1


def test_heads_for_another_base_model_do_not_count(
    registry: Registry, heads: Path, part: Path
) -> None:
    put(registry, "heads", heads, base_fingerprint="sha256:" + "0" * 64)
    with pytest.raises(FailedPreconditionError, match="no whole heads for this base model"):
        put(registry, "part", part)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (partial(write_heads, num_heads=2), "has 2 heads of 1 blocks, but its config says 3 of 1"),
        (partial(write_heads, num_blocks=2), "has 3 heads of 2 blocks, but its config says 3 of 1"),
        (partial(write_heads, vocab_size=SHAPES.vocab_size), "are version 1 heads"),
    ],
)
def test_heads_of_other_blocks_are_refused(
    registry: Registry, tmp_path: Path, part: Path, make: Callable[..., Path], wrong: str
) -> None:
    whole = make(tmp_path / "whole", H)
    put(registry, "whole", whole)
    edit_json(part / HEADS_CONFIG, shared_heads=shared(whole))
    with pytest.raises(InvalidArgumentError, match=f"a private part of 'whole', which {wrong}"):
        put(registry, "part", part)


def test_a_part_of_a_part_is_refused(registry: Registry, heads: Path, part: Path) -> None:
    put(registry, "heads", heads)
    put(registry, "part", part)
    edit_json(part / HEADS_CONFIG, shared_heads=shared(part))
    with pytest.raises(FailedPreconditionError, match="the store has no whole heads"):
        put(registry, "another", part)


# -- from the store to the buffer -----------------------------------------------------------------


def test_from_folder_to_views(registry: Registry, tmp_path: Path) -> None:
    """By block, then head; nothing of the heads that it corrects is in its buffer."""
    ids = range(SHAPES.vocab_size)
    whole = write_heads(tmp_path / "whole", H, num_heads=2, num_blocks=2, draft_vocabulary=ids)
    part = write_private(tmp_path / "part", whole, rank=RANK)
    put(registry, "whole", whole)
    record = put(registry, "part", part)
    loader = Loader(
        registry=registry,
        shapes=SHAPES,
        allocate=partial(allocate, dtype=torch.float32),
        head_rows=None,
    )
    packed = loader(record.digest)
    assert DRAFT_KEY not in packed.layout.slots
    assert correction(packed.buffer, packed.layout).output is None
    weights = correction(packed.buffer, packed.layout).private
    stored = load_file(part / HEADS_FILE)
    for block in range(2):
        for head in range(2):
            name = f"{head}.{block}.linear.lora_"
            assert torch.equal(weights.a_LKRH[block, head], stored[f"{name}A.weight"])
            assert torch.equal(weights.b_LKHR[block, head], stored[f"{name}B.weight"])
    assert weights.rank == RANK
    assert weights.a_LKRH.is_contiguous() and weights.b_LKHR.is_contiguous()
    assert packed.nbytes <= 4 * (sum(t.numel() for t in stored.values()) + 2 * 16)
