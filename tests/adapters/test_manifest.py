"""What validation found out is written down once: a load resolves nothing again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.formats.parse import parse
from lorastack.adapters.formats.patterns import Names
from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.store.manifest import Manifest, runs
from lorastack.adapters.store.registry import Registry
from lorastack.errors import DataLossError, InvalidArgumentError
from lorastack.kernels.packing import allocate
from lorastack.layout import AdapterKind
from tests.adapters.folders import FACTS, SHAPES, files_of, read_folder, reopen, send, specs_of
from tests.helpers.adapters import write_heads, write_lora


def no_copies(name: str) -> Any:
    raise AssertionError(name)


VALIDATE = Validator(
    shapes=SHAPES, base_names=("tiny",), base_weight=no_copies, base_token={"a": 1}.get
)


def upload(registry: Registry, folder: Path) -> str:
    files = read_folder(folder)
    upload = registry.begin_upload("x", specs_of(files))
    send(upload, list(files.values()))
    return upload.commit(VALIDATE, base_fingerprint="base").digest


def loaded_scales(registry: Registry, digest: str) -> Mapping[tuple[int, str], float]:
    load = Loader(
        registry=registry,
        shapes=SHAPES,
        allocate=partial(allocate, dtype=torch.float32),
        head_rows=no_copies,
    )
    return load(digest).layout.scales


@pytest.fixture
def patterned(tmp_path: Path) -> Path:
    """Every module has a scale of its own reason."""
    return write_lora(
        tmp_path / "patterned",
        SHAPES,
        rank=4,
        targets=("q_proj", "up_proj", "lm_head", "embed_tokens"),
        use_rslora=True,
        alpha_pattern={r"layers\.1\..*": 3, "lm_head": 7, "up_proj": 0.5},
    )


@pytest.fixture
def no_matching(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def matching(*args: object) -> int:
        raise AssertionError("a pattern is matched")

    with monkeypatch.context() as patch:
        patch.setattr(Names, "full_matches", matching)
        patch.setattr(Names, "suffix_matches", matching)
        patch.setattr(Names, "chosen", matching)
        yield


def test_a_load_matches_no_pattern(
    registry: Registry, root: Path, patterned: Path, request: pytest.FixtureRequest
) -> None:
    digest = upload(registry, patterned)
    expected = parse(files_of(patterned), SHAPES).scales
    assert len(set(expected.values())) == 4
    request.getfixturevalue("no_matching")
    assert loaded_scales(registry, digest) == expected
    assert loaded_scales(reopen(registry, root), digest) == expected


def test_what_was_stored_before_is_resolved_when_it_is_loaded(
    registry: Registry, root: Path, patterned: Path
) -> None:
    digest = upload(registry, patterned)
    (path,) = (root / "manifests").iterdir()
    fields = json.loads(path.read_bytes())
    for name in ("scales", "warnings", "check"):
        del fields[name]
    path.write_text(json.dumps(fields))
    registry = reopen(registry, root)
    assert registry.manifest(digest).module_scales is None
    assert loaded_scales(registry, digest) == parse(files_of(patterned), SHAPES).scales


@pytest.mark.parametrize(
    ("old", "new"), [("3.5", "2.5"), ('"check"', '"chick"'), ('"scales"', '"skales"'), ("3", "4")]
)
def test_a_damaged_scale_is_found(
    registry: Registry, root: Path, patterned: Path, old: str, new: str
) -> None:
    """Nothing else would tell."""
    upload(registry, patterned)
    (path,) = (root / "manifests").iterdir()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataLossError):
        reopen(registry, root).resolve("x")


def test_scales_of_another_number_of_modules_are_refused(patterned: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="6 modules have a LoRA, but 5 scales are known"):
        parse(files_of(patterned), SHAPES, [1.0] * 5)


def test_warnings_are_kept(registry: Registry, root: Path, tmp_path: Path) -> None:
    folder = write_heads(tmp_path / "h", SHAPES.hidden_size, base_model_name_or_path="/data/x/y")
    (folder / "added_tokens.json").write_text('{"a": 1, "<b>": 40}')
    upload(registry, folder)
    warnings = reopen(registry, root).resolve("x").manifest.facts.warnings
    assert ["/data/x/y" in warnings[0], "<b>" in warnings[1]] == [True, True]


@given(st.lists(st.sampled_from([0.0, 1.0, 0.1, -3e38, 5e-324])))
def test_runs_give_the_scales_back(scales: list[float]) -> None:
    digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    manifest = Manifest(
        digest=digest, files=(), facts=FACTS, base_fingerprint="", scales=runs(scales)
    )
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert (manifest.module_scales or []) == scales


WRITTEN = b"""\
{
 "alpha": 8.0,
 "base_fingerprint": "sha256:base",
 "base_model": "org/tiny",
 "check": "f7c88dea84975efa1ac04ee8fec7484b2fd296bcf7f55f363950b4c6bce586e9",
 "digest": "sha256:fe545712592d62ab0601e4a330eae0c9a08938076fe19e5c049990968326eba1",
 "files": [
  {
   "name": "adapter_config.json",
   "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
   "size": 2
  }
 ],
 "kind": "lora_with_medusa",
 "medusa_version": 2,
 "num_heads": 3,
 "num_layers": 1,
 "rank": 4,
 "scales": [
  [
   2.0,
   3
  ],
  [
   0.5,
   1
  ]
 ],
 "target_modules": [
  "q_proj",
  "up_proj"
 ],
 "warnings": [
  "odd"
 ]
}
"""


def test_a_manifest_is_read_and_written_as_ever() -> None:
    """Byte for byte what stores on disks hold."""
    manifest = Manifest.from_bytes(WRITTEN)
    assert manifest.to_bytes() == WRITTEN
    assert manifest.facts == Facts(
        kind=AdapterKind.LORA_WITH_MEDUSA,
        base_model="org/tiny",
        rank=4,
        alpha=8.0,
        target_modules=("q_proj", "up_proj"),
        num_heads=3,
        num_layers=1,
        medusa_version=2,
        warnings=("odd",),
    )
    assert manifest.module_scales == [2.0, 2.0, 2.0, 0.5]


@pytest.mark.parametrize("change", [("kind", None), ("rank", None), ("more", 1)], ids=str)
def test_a_manifest_without_a_fact_or_with_another_is_damaged(change: tuple[str, Any]) -> None:
    fields = json.loads(WRITTEN)
    for name in ("check", "scales"):
        del fields[name]
    Manifest.from_bytes(json.dumps(fields).encode())
    name, value = change
    fields[name] = value
    if value is None:
        del fields[name]
    with pytest.raises((KeyError, TypeError)):
        Manifest.from_bytes(json.dumps(fields).encode())
