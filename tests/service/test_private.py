"""What a request gets by naming a private part of heads, and what is told about both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from lorastack.adapters.catalogue import Catalogue
from lorastack.adapters.store.registry import Registry
from lorastack.client import Client
from lorastack.errors import FailedPreconditionError, NotFoundError, Reason
from lorastack.layout import ModelShapes
from lorastack.request import HeadsUse
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1.adapters_pb2 import Adapter
from tests.helpers.adapters import write_heads, write_lora, write_private
from tests.service.fakes import RunningServer, served_model, store


@pytest.fixture
def made(tmp_path: Path, shapes: ModelShapes) -> dict[str, Path]:
    """Heads, other heads of the same shape, a private part of the first, and a bundle of it."""
    whole = write_heads(tmp_path / "whole", shapes.hidden_size, seed=1)
    bundle = write_lora(tmp_path / "bundle", shapes, targets=("q_proj",), seed=3)
    part = write_private(tmp_path / "part", whole)
    for path in part.iterdir():
        shutil.copy(path, bundle)
    return {
        "whole": whole,
        "other": write_heads(tmp_path / "other", shapes.hidden_size, seed=2),
        "part": part,
        "bundle": bundle,
    }


@pytest.fixture
def registry(tmp_path: Path, made: dict[str, Path], shapes: ModelShapes) -> Registry:
    registry = Registry(tmp_path / "store")
    for name, folder in made.items():
        store(registry, name, folder, shapes)
    return registry


@pytest.fixture
def catalogue(registry: Registry, tokenizer: Tokenizer, shapes: ModelShapes) -> Catalogue:
    return Catalogue(served_model(tokenizer, shapes), registry, "")


def digest_of(registry: Registry, adapter_id: str) -> str:
    return registry.resolve(adapter_id).digest


def test_a_part_brings_the_heads_that_it_corrects(
    catalogue: Catalogue,
    registry: Registry,
    made: dict[str, Path],
    tokenizer: Tokenizer,
    shapes: ModelShapes,
) -> None:
    shared = {"shared_id": "whole", "shared_digest": digest_of(registry, "whole")}
    part = HeadsUse(medusa_id="part", digest=digest_of(registry, "part"), **shared)
    bundle = HeadsUse(medusa_id="bundle", digest=digest_of(registry, "bundle"), **shared)
    assert part.digests == (digest_of(registry, "whole"), digest_of(registry, "part"))
    with_default = Catalogue(served_model(tokenizer, shapes), registry, "part")
    for _ in range(2):
        assert catalogue.resolve((), "part")[1] == part
        assert catalogue.resolve((("bundle", 1.0),), "")[1] == bundle
        assert catalogue.resolve((), "bundle")[1] == bundle
        assert with_default.resolve((), "")[1] == part
        # Other heads under the id: the part keeps those that it was made for.
        store(registry, "whole", made["other"], shapes)
        assert catalogue.heads("whole").digest == digest_of(registry, "other")
    whole = catalogue.heads(f"whole@{shared['shared_digest']}")
    assert (whole.shared_digest, whole.digests) == ("", (shared["shared_digest"],))


def test_heads_that_are_gone_are_told_with_the_part(
    catalogue: Catalogue, registry: Registry, made: dict[str, Path], shapes: ModelShapes
) -> None:
    registry.delete("whole")
    store(registry, "whole", made["other"], shapes)
    for loras, medusa_id, name in (
        ((), "part", "part"),
        ((("bundle", 1.0),), "", "bundle"),
        ((("bundle", 1.0),), "part", "part"),
    ):
        with pytest.raises(NotFoundError, match=f"'{name}' is a private part .*'whole'") as caught:
            catalogue.resolve(loras, medusa_id)
        assert caught.value.metadata == {"adapter_id": "whole", "private_id": name}
    assert catalogue.resolve((("bundle", 1.0),), "none")[1] is None
    store(registry, "again", made["whole"], shapes)
    assert catalogue.heads("part").shared_id == "again"


def test_what_trees_start_from(
    catalogue: Catalogue, registry: Registry, made: dict[str, Path], shapes: ModelShapes
) -> None:
    """The part's own knowledge, else that of the heads, else nothing."""
    assert catalogue.heads("part").prior == ""

    def know(folder: Path, what: str) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["acceptance"] = {"says": what}
        (folder / "config.json").write_text(json.dumps(config))
        store(registry, folder.name, folder, shapes)

    know(made["whole"], "whole")
    assert json.loads(catalogue.heads("whole").prior) == {"says": "whole"}
    assert json.loads(catalogue.heads("part").prior) == {"says": "whole"}
    know(made["part"], "part")
    assert json.loads(catalogue.heads("part").prior) == {"says": "part"}


def test_a_part_over_the_wire(
    client: Client, fake: RunningServer, made: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(FailedPreconditionError, match="upload 'whole' first") as caught:
        client.upload(made["part"], "part")
    assert caught.value.reason is Reason.SHARED_HEADS_MISSING
    digests = {name: client.upload(made[name], name).digest for name in ("whole", "part", "bundle")}
    stored = client.get_adapter("part")
    assert stored.kind == Adapter.MEDUSA
    assert (stored.num_heads, stored.private_rank, stored.shared_heads_id) == (3, 3, "whole")
    assert len(stored.shared_heads_sha256) == 64
    listed = {each.id: each for each in client.list_adapters()}
    assert listed["bundle"].kind == Adapter.LORA_WITH_MEDUSA
    assert listed["bundle"].shared_heads_sha256 == stored.shared_heads_sha256
    assert listed["whole"].shared_heads_id == "" == listed["whole"].shared_heads_sha256
    for fields, name in (({"medusa_id": "part"}, "part"), ({"lora_id": "bundle"}, "bundle")):
        reply = client.generate(
            pb.GenerateRequest(prompt="hi", stop=pb.StopParams(max_new_tokens=1), **fields)
        )
        assert (reply.adapters.medusa_id, reply.adapters.medusa_digest) == (name, digests[name])
        assert reply.adapters.shared_medusa_id == "whole"
        assert reply.adapters.shared_medusa_digest == digests["whole"]
    client.download("part", tmp_path / "copy")
    assert client.upload(tmp_path / "copy", "copy").digest == digests["part"]
    client.set_default_medusa("part")
    assert client.model_info().default_medusa_digest == digests["part"]
    with pytest.raises(FailedPreconditionError) as refused:
        client.delete_adapter("whole")
    assert refused.value.reason is Reason.ADAPTER_IN_USE
    client.set_default_medusa("")
    client.delete_adapter("whole")
    with pytest.raises(NotFoundError, match="'part' is a private part of other heads: no heads"):
        client.generate(pb.GenerateRequest(prompt="hi", medusa_id="part"))
    with pytest.raises(NotFoundError, match="'part' is a private part of other heads: no heads"):
        client.load("part")
    client.delete_adapter("part")


def test_a_load_of_a_part_brings_both(
    client: Client, fake: RunningServer, made: dict[str, Path]
) -> None:
    digests = {name: client.upload(made[name], name).digest for name in ("whole", "part")}
    loaded = client.load("part", pin=True)
    assert loaded.residency == Adapter.DEVICE and loaded.pinned
    assert fake.pool.residents.keys() == set(digests.values())


def test_heads_that_are_deleted_while_their_part_is_loaded_are_forgotten(
    client: Client, fake: RunningServer, made: dict[str, Path]
) -> None:
    digests = {name: client.upload(made[name], name).digest for name in ("whole", "part")}
    writer, load = fake.server._adapters._writer, fake.engine.load

    def load_late(digest: str, pin: bool, needs: Sequence[str]) -> Future[None]:
        writer.delete("whole", ())
        return load(digest, pin, needs)

    fake.engine.load = load_late  # type: ignore[method-assign]
    with pytest.raises(NotFoundError, match="was deleted or replaced while it was loaded"):
        client.load("part", pin=True)
    client.prune_revisions()  # the store's one thread has done what it was told before
    assert fake.engine.forgotten == [digests["whole"]] * 2
    assert fake.pool.residents.keys() == {digests["part"]}


def test_what_a_part_corrects_is_not_forgotten_before_it(
    client: Client, fake: RunningServer, made: dict[str, Path]
) -> None:
    """New heads under their id change nothing for it; when it goes, they go."""
    whole = client.upload(made["whole"], "whole").digest
    part = client.upload(made["part"], "part").digest
    client.upload(made["other"], "whole")
    assert fake.engine.forgotten == []
    client.delete_adapter("part")
    assert sorted(fake.engine.forgotten) == sorted([whole, part])
