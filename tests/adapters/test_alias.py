"""alias.json: what it may hold, and how the store keeps what an alias names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.formats.alias import MAX_ALIAS, Alias
from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.store.registry import Registry
from lorastack.errors import InvalidArgumentError
from lorastack.folders import choose
from lorastack.layout import AdapterKind
from lorastack.request import MAX_LORAS
from tests.adapters.folders import (
    FACTS,
    ONE,
    TWO,
    VALIDATE,
    edit_json,
    files_of,
    parse_folder,
    refused,
    reopen,
    store,
)


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "alias.json").write_text(text)
    return folder


def alias_file(*loras: dict[str, Any], medusa_id: str = "") -> dict[str, bytes]:
    return {"alias.json": json.dumps({"loras": loras, "medusa_id": medusa_id}).encode()}


def store_alias(registry: Registry, alias_id: str, contents: dict[str, bytes]) -> str:
    return store(registry, alias_id, contents, validate=VALIDATE).digest


def test_what_an_alias_says(tmp_path: Path) -> None:
    text = '{"loras": [{"lora_id": "a"}, {"lora_id": "n/b", "scale": -0.1}], "medusa_id": "none"}'
    facts = VALIDATE(files_of(write(tmp_path / "a", text))).facts
    assert facts.kind is AdapterKind.ALIAS
    assert not (facts.kind.has_lora or facts.kind.has_heads)
    assert facts.alias is not None
    assert facts.alias.medusa_id == "none"
    # Scales are those that a request can say, which has them as float32.
    assert facts.alias.loras == (("a", 1.0), ("n/b", -0.10000000149011612))
    assert Facts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    only_heads = parse_folder(write(tmp_path / "b", '{"medusa_id": "h"}')).facts.alias
    assert only_heads == Alias(loras=(), medusa_id="h")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "alias.json is not valid JSON"),
        ("[]", "alias.json must hold a JSON object"),
        ("{}", "names nothing"),
        ('{"loras": [], "medusa_id": ""}', "names nothing"),
        ('{"lora": []}', "'lora'"),
        ('{"loras": {}}', "loras .* must be a list"),
        ('{"loras": null}', "loras .* must be a list"),
        ('{"loras": ["a"]}', "list of objects"),
        ('{"loras": [{"scale": 1}]}', "lora_id"),
        ('{"loras": [{"lora_id": ""}]}', "lora_id"),
        ('{"loras": [{"lora_id": 1}]}', "lora_id"),
        ('{"loras": [{"lora_id": "a", "weight": 1}]}', "'weight'"),
        ('{"loras": [{"lora_id": "a", "scale": "1"}]}', "scale of 'a'"),
        ('{"loras": [{"lora_id": "a", "scale": true}]}', "scale of 'a'"),
        ('{"loras": [{"lora_id": "a", "scale": null}]}', "scale of 'a'"),
        ('{"loras": [{"lora_id": "a", "scale": NaN}]}', "NaN"),
        ('{"loras": [{"lora_id": "a", "scale": 1e999}]}', "scale of 'a'"),
        ('{"loras": [{"lora_id": "a", "scale": 1000001}]}', "scale of 'a'"),
        ('{"loras": [{"lora_id": "a"}, {"lora_id": "a", "scale": 2}]}', "'a' twice"),
        ('{"loras": [], "loras": []}', "'loras' twice"),
        ('{"medusa_id": 1}', "medusa_id .* must be text"),
        ('{"medusa_id": null}', "medusa_id .* must be text"),
        (json.dumps({"loras": [{"lora_id": f"{n}"} for n in range(MAX_LORAS + 1)]}), "at most 16"),
        (" " * (MAX_ALIAS + 1), "larger than"),
    ],
)
def test_malformed_aliases_are_refused_by_name(tmp_path: Path, text: str, named: str) -> None:
    refused(write(tmp_path / "a", text), named)


def test_an_alias_is_one_file(tmp_path: Path, lora: Path) -> None:
    refused(write(lora, '{"medusa_id": "h"}'), "alias.json makes the folder an alias")
    assert choose(["alias.json", ".git/"], "x", lambda _: ()).files == ("alias.json",)
    with pytest.raises(InvalidArgumentError, match="safetensors"):
        choose(["other.json"], "x", lambda _: ())


def test_manifests_without_aliases_are_as_they_were(lora: Path) -> None:
    """Older versions read, and wrote, them without the field."""
    assert "alias" not in FACTS.to_json()
    assert Facts.from_json(FACTS.to_json()) == FACTS


def test_aliases_are_stored_as_adapters_are(registry: Registry, root: Path) -> None:
    store(registry, "a", ONE)
    first = store_alias(registry, "x", alias_file({"lora_id": "a"}))
    second = store_alias(registry, "x", alias_file({"lora_id": "a", "scale": 0.5}))
    assert first != second
    registry = reopen(registry, root)
    alias = registry.resolve("x").manifest.facts.alias
    assert alias == Alias(loras=(("a", 0.5),), medusa_id="")
    assert registry.rollback("x", first).revision == 3
    alias = registry.resolve("x").manifest.facts.alias
    assert alias == Alias(loras=(("a", 1.0),), medusa_id="")
    assert registry.prune(1, "x").num_revisions == 2
    registry.delete("x")
    assert [record.id for record in registry.list()] == ["a"]
    registry.close()


def test_a_damaged_alias_is_told_and_not_served(registry: Registry, root: Path) -> None:
    digest = store_alias(registry, "x", alias_file({"lora_id": "a"}))
    edit_json(root / "manifests" / f"{digest.removeprefix('sha256:')}.json", alias={"loras": 1})
    registry = reopen(registry, root)
    assert registry.recovery.damaged
    assert registry.list() == []
    registry.close()


def test_revisions_that_an_alias_names_are_not_pruned(registry: Registry) -> None:
    first = store(registry, "a", ONE).digest
    store(registry, "a", TWO)
    store_alias(registry, "x", alias_file({"lora_id": f"a@{first}"}))
    assert registry.prune(1).num_revisions == 0
    assert registry.resolve(f"a@{first}").digest == first
    # An older revision of the alias keeps nothing.
    store_alias(registry, "x", alias_file(medusa_id=f"a@{first}"))
    assert registry.prune(1, "a").num_revisions == 0
    store_alias(registry, "x", alias_file({"lora_id": "a"}))
    assert registry.prune(1, "a").num_revisions == 1
