"""What a request gets by naming an alias, and what is told about the parts of one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.store.registry import Registry
from lorastack.client import Client
from lorastack.errors import InvalidArgumentError, NotFoundError, Reason
from lorastack.layout import ModelShapes
from lorastack.request import HeadsUse
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1.adapters_pb2 import Adapter
from tests.service.fakes import RunningServer, served_model, store

Folders = dict[str, Path]
Alias = Callable[..., str]


@pytest.fixture
def known(tmp_path: Path, folders: Folders, shapes: ModelShapes) -> Iterator[Registry]:
    """A store of the test's own."""
    registry = Registry(tmp_path / "store")
    for name in folders:
        store(registry, name, folders[name], shapes)
    yield registry
    registry.close()


@pytest.fixture
def catalogue(known: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> Catalogue:
    return Catalogue(served_model(tokenizer, shapes), known, "")


@pytest.fixture
def alias(tmp_path: Path, known: Registry, shapes: ModelShapes) -> Alias:
    """alias("x", "a", ("b", 0.5), medusa_id="h"): its digest; nothing checks the names."""

    def put(alias_id: str, *loras: str | tuple[str, float], medusa_id: str = "") -> str:
        pairs = [(lora, 1.0) if isinstance(lora, str) else lora for lora in loras]
        entries = [{"lora_id": name, "scale": scale} for name, scale in pairs]
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        text = json.dumps({"loras": entries, "medusa_id": medusa_id})
        (folder / "alias.json").write_text(text)
        return store(known, alias_id, folder, shapes).digest

    return put


def named(alias_id: str) -> tuple[tuple[str, float], ...]:
    return ((alias_id, 1.0),)


def test_an_alias_is_the_selection_it_names(catalogue: Catalogue, alias: Alias) -> None:
    alias("x", ("lora", 0.5), "other", medusa_id="heads")
    parts = (("lora", 0.5), ("other", 1.0))
    assert catalogue.resolve(named("x"), "") == catalogue.resolve(parts, "heads")
    # The request's own medusa_id wins.
    assert catalogue.resolve(named("x"), "none") == catalogue.resolve(parts, "none")
    assert catalogue.resolve(named("x"), "bundle") == catalogue.resolve(parts, "bundle")


def test_which_heads_an_alias_brings(
    catalogue: Catalogue, alias: Alias, known: Registry, tokenizer: Tokenizer, shapes: ModelShapes
) -> None:
    with_default = Catalogue(served_model(tokenizer, shapes), known, "heads")
    alias("plain", "lora")
    alias("bundled", ("bundle", 0.5))
    alias("stacked", "bundle", "lora")
    alias("quiet", "bundle", medusa_id="none")
    alias("drafts", medusa_id="bundle")

    def heads(where: Catalogue, lora_id: str, medusa_id: str = "") -> str:
        _, use = where.resolve(named(lora_id), medusa_id)
        return "" if use is None else use.medusa_id

    assert [heads(catalogue, name) for name in ("plain", "stacked", "quiet")] == ["", "", ""]
    assert [heads(with_default, name) for name in ("plain", "stacked")] == ["heads", "heads"]
    assert heads(with_default, "quiet") == ""
    assert heads(with_default, "bundled") == heads(with_default, "drafts") == "bundle"
    assert catalogue.resolve(named("drafts"), "")[0] == ()
    # As medusa_id it gives the heads that it brings.
    assert heads(catalogue, "lora", "drafts") == heads(catalogue, "lora", "bundled") == "bundle"
    for name in ("plain", "stacked", "quiet"):
        with pytest.raises(InvalidArgumentError, match=f"'{name}' names no Medusa heads"):
            catalogue.resolve((), name)


def test_an_alias_goes_alone_and_without_a_scale(catalogue: Catalogue, alias: Alias) -> None:
    alias("x", "lora")
    for loras in ((("other", 1.0), ("x", 1.0)), (("x", 1.0), ("other", 1.0)), (("x", 0.5),)):
        with pytest.raises(InvalidArgumentError, match="'x' is an alias, a whole") as caught:
            catalogue.resolve(loras, "")
        assert caught.value.reason is Reason.WRONG_ADAPTER_KIND


def test_revisions_of_aliases_and_of_what_they_name(
    catalogue: Catalogue, alias: Alias, known: Registry, folders: Folders, shapes: ModelShapes
) -> None:
    pinned = known.resolve("lora").digest
    first = alias("x", "lora")
    alias("x", f"lora@{pinned}")
    store(known, "lora", folders["other"], shapes)
    newest = known.resolve("lora").digest
    assert newest != pinned
    assert [use.digest for use in catalogue.resolve(named("x"), "")[0]] == [pinned]
    assert [use.digest for use in catalogue.resolve(named(f"x@{first}"), "")[0]] == [newest]


def test_a_missing_part_is_told_with_its_alias(
    catalogue: Catalogue, alias: Alias, known: Registry
) -> None:
    alias("x", "lora", "other", medusa_id="heads")
    known.delete("heads")
    with pytest.raises(NotFoundError, match="alias 'x': no adapter 'heads'") as caught:
        catalogue.resolve(named("x"), "")
    assert caught.value.metadata == {"adapter_id": "heads", "alias_id": "x"}
    assert len(catalogue.resolve(named("x"), "none")[0]) == 2
    known.delete("other")
    for medusa_id in ("", "none"):
        with pytest.raises(NotFoundError, match="alias 'x': no adapter 'other'"):
            catalogue.resolve(named("x"), medusa_id)
    with pytest.raises(NotFoundError, match="alias 'x': no adapter 'heads'"):
        catalogue.resolve((), "x")


def test_a_part_that_became_an_alias_is_refused(catalogue: Catalogue, alias: Alias) -> None:
    alias("x", "lora", medusa_id="heads")
    alias("lora", "other")
    with pytest.raises(InvalidArgumentError, match="alias 'x': 'lora' is an alias of other"):
        catalogue.resolve(named("x"), "")


def test_whose_template_an_alias_uses(catalogue: Catalogue, alias: Alias) -> None:
    alias("one", ("chatty", 0.5))
    alias("two", "chatty", "lora")
    assert catalogue.own_template("one") == catalogue.own_template("chatty") is not None
    assert catalogue.own_template("two") is None


@pytest.mark.parametrize(
    ("loras", "medusa_id", "kind", "wrong"),
    [
        ((("no", 1.0),), "", NotFoundError, "no adapter 'no'"),
        ((("lora", 1.0),), "no", NotFoundError, "no adapter 'no'"),
        ((("heads", 1.0),), "", InvalidArgumentError, "'heads' holds Medusa heads"),
        ((("lora", 1.0),), "other", InvalidArgumentError, "'other' holds a LoRA without"),
        ((("old", 1.0),), "", InvalidArgumentError, "'old' is an alias of lora"),
        ((), "old", InvalidArgumentError, "'old' is an alias of lora"),
        ((("base", 1.0),), "", InvalidArgumentError, "'base' is a reserved word"),
        ((("lora", 1.0), ("twin", 1.0)), "", InvalidArgumentError, "'lora' and 'twin'"),
        ((("lora@sha256:" + "0" * 64, 1.0),), "", NotFoundError, "no adapter 'lora@sha256:000"),
        ((("new", 1.0),), "", InvalidArgumentError, "cannot stand for itself"),
    ],
)
def test_an_alias_of_wrong_parts_is_not_stored(
    client: Client,
    fake: RunningServer,
    folders: Folders,
    loras: tuple[tuple[str, float], ...],
    medusa_id: str,
    kind: type[Exception],
    wrong: str,
) -> None:
    for name in ("lora", "other", "heads"):
        client.upload(folders[name], name)
    client.upload(folders["lora"], "twin")
    client.alias("old", [("lora", 1.0)])
    with pytest.raises(kind, match=f"alias 'new': .*{wrong}"):
        client.alias("new", loras, medusa_id)
    with pytest.raises(NotFoundError):
        client.get_adapter("new")


def test_an_alias_over_the_wire(
    client: Client, fake: RunningServer, folders: Folders, tmp_path: Path
) -> None:
    digests = {name: client.upload(folders[name], name).digest for name in ("lora", "heads")}
    stored = client.alias("x", [("lora", 0.1)], "heads", if_digest="")
    assert stored.kind == Adapter.ALIAS
    assert [ref.lora_id for ref in stored.alias_loras] == ["lora"]
    assert stored.alias_medusa_id == "heads"
    assert stored.residency == Adapter.DISK
    assert client.alias("x", [("lora", 0.1)], "heads").digest == stored.digest
    assert client.get_adapter("x") == stored
    assert {each.id: each.kind for each in client.list_adapters()}["x"] == Adapter.ALIAS
    client.generate(pb.GenerateRequest(prompt="hi", lora_id="x", stop={"max_new_tokens": 1}))
    refs = [pb.LoraRef(lora_id="lora", scale=0.1)]
    parts = pb.GenerateRequest(
        prompt="hi", loras=refs, medusa_id="heads", stop=pb.StopParams(max_new_tokens=1)
    )
    client.generate(parts)
    by_alias, by_parts = fake.engine.submitted
    assert by_alias.loras == by_parts.loras
    assert by_alias.heads == HeadsUse(medusa_id="heads", digest=digests["heads"])
    asked: Any = pb.TokenizeRequest(prompt="hi", lora_id="x")
    assert client.tokenize(asked) == client.tokenize(pb.TokenizeRequest(prompt="hi"))
    client.download("x", tmp_path / "copy")
    assert client.upload(tmp_path / "copy", "y").digest == stored.digest
    client.delete_adapter("lora")
    for request in (parts, pb.GenerateRequest(prompt="hi", lora_id="x")):
        with pytest.raises(NotFoundError, match="no adapter 'lora'"):
            client.generate(request)
    with pytest.raises(NotFoundError, match="alias 'x': no adapter 'lora'"):
        client.tokenize(asked)


def test_an_alias_has_no_place_in_memory(
    client: Client, fake: RunningServer, folders: Folders
) -> None:
    for name in ("lora", "heads"):
        client.upload(folders[name], name)
    client.alias("x", [("lora", 1.0)], "heads")
    for call in (client.load, client.unload):
        with pytest.raises(InvalidArgumentError, match="'x' is an alias of lora, heads"):
            call("x")
    with pytest.raises(InvalidArgumentError, match="'x' is an alias of lora, heads"):
        client.set_default_medusa("x")
    assert fake.engine.calls == []
