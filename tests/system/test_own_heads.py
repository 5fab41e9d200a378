"""Default heads that a server finds for itself: beside its model's backbone, or on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorastack.config import MIB, AdapterConfig, EngineConfig
from lorastack.errors import NotFoundError, UnavailableError
from tests.helpers.adapters import with_outputs
from tests.helpers.fake_hub import FakeHub
from tests.helpers.live import LiveServer, ask
from tests.helpers.tiny import build_llama
from tests.helpers.zoo import FAMILIAR, TRAINED_HEADS

ENGINE = EngineConfig(kv_memory=16 * MIB, max_rows=8, max_nodes=6)
OWN = "medusa-2-tiny-medusa"


def with_own_heads(folder: Path, backbone: Path, heads: Path) -> Path:
    """A Medusa-2 checkpoint: the heads' tensors beside the backbone's, in a second shard."""
    shutil.copytree(backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    fields = json.loads((heads / "config.json").read_text())
    for field in ("medusa_num_heads", "medusa_num_layers"):
        config[field] = fields[field]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        f"medusa_head.{name}": tensor
        for name, tensor in load_file(heads / "medusa_lm_head.safetensors").items()
    }
    names = load_file(folder / "model.safetensors").keys()
    save_file(tensors, folder / "heads.safetensors")
    (folder / "model.safetensors").rename(folder / "backbone.safetensors")
    places = dict.fromkeys(names, "backbone.safetensors")
    places |= dict.fromkeys(tensors, "heads.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.fixture(params=[1, 2], ids=["version-1", "version-2"])
def model(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Path, zoo: dict[str, Path]
) -> Path:
    heads = zoo[TRAINED_HEADS]
    if request.param == 1:  # as they are published: each head with its own rows of lm_head
        output_VH = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
        heads = with_outputs(tmp_path / "version-1", heads, output_VH)
    return with_own_heads(tmp_path / "medusa 2-tiny", tiny_llama, heads)


def serve(model: Path, store: Path, **limits: object) -> LiveServer:
    return LiveServer(model, engine=ENGINE, adapters=AdapterConfig(store=store, **limits))  # type: ignore[arg-type]


def default_of(server: LiveServer) -> str:
    reply = server.client.generate(ask(heads="", max_new_tokens=1))
    return reply.adapters.medusa_id


def test_heads_beside_the_backbone_draft_by_default(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path / "store") as server:
        (stored,) = server.client.list_adapters()
        assert stored.id == OWN
        server.digests[OWN] = stored.digest
        server.load_heads(OWN)
        accepted = 0
        for prompt in FAMILIAR:
            plain, drafted = (
                server.client.generate(
                    ask(prompt, heads="", off=off, max_new_tokens=40, ignore_eos=True)
                )
                for off in (True, False)
            )
            assert drafted.token_ids == plain.token_ids
            assert drafted.adapters.medusa_digest == stored.digest
            accepted += sum(drafted.speculation.accepted_by_head)
        assert accepted > 0
    with serve(model, tmp_path / "store") as server:  # the same at a restart
        assert [
            (each.id, each.digest, each.revision) for each in server.client.list_adapters()
        ] == [(OWN, stored.digest, 1)]
        assert default_of(server) == OWN


def test_what_users_chose_since_stays_at_a_restart(
    model: Path, tmp_path: Path, zoo: dict[str, Path]
) -> None:
    with serve(model, tmp_path / "store") as server:
        server.upload(OWN, zoo["heads-2"])
        server.client.set_default_medusa("")
        chosen = server.digests[OWN]
    with serve(model, tmp_path / "store") as server:
        (stored,) = server.client.list_adapters()
        assert (stored.digest, stored.revision) == (chosen, 2)
        assert default_of(server) == ""


def test_a_default_for_another_base_makes_way(
    model: Path, tmp_path: Path, zoo: dict[str, Path]
) -> None:
    with serve(build_llama(tmp_path / "other", seed=9), tmp_path / "store") as server:
        server.upload("heads-2", zoo["heads-2"])
        server.client.set_default_medusa("heads-2")
    with serve(model, tmp_path / "store") as server:
        assert default_of(server) == OWN


def test_the_option_wins(model: Path, tmp_path: Path, zoo: dict[str, Path]) -> None:
    with serve(model, tmp_path / "store") as server:
        server.upload("heads-2", zoo["heads-2"])
    with serve(model, tmp_path / "store", default_medusa="heads-2") as server:
        assert default_of(server) == "heads-2"
    with serve(model, tmp_path / "store", default_medusa="none") as server:
        assert default_of(server) == ""
        assert server.client.generate(ask(heads=OWN)).adapters.medusa_id == OWN
    with serve(model, tmp_path / "store", read_only_store=True) as server:
        assert default_of(server) == OWN


def test_a_store_that_is_only_read_goes_without(model: Path, tmp_path: Path) -> None:
    with serve(model, tmp_path / "store") as server:
        server.client.set_default_medusa("")
        server.client.delete_adapter(OWN)
    with serve(model, tmp_path / "store", read_only_store=True) as server:
        assert default_of(server) == ""
        assert server.client.list_adapters() == []


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, zoo: dict[str, Path]) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_folder("acme/wise", zoo[TRAINED_HEADS])
        yield hub


def test_default_heads_are_pulled_at_the_first_start(
    hub: FakeHub, tmp_path: Path, tiny_llama: Path
) -> None:
    wanted = {"default_medusa": "acme/wise", "pull_orgs": ("acme",)}
    hub.cut = 500  # the hub breaks off: what arrived stays for the next start
    with pytest.raises(UnavailableError):
        serve(tiny_llama, tmp_path / "store", **wanted).__enter__()
    hub.cut = None
    for transfers in (True, False):
        hub.transfers.clear()
        with serve(tiny_llama, tmp_path / "store", **wanted) as server:
            assert default_of(server) == "acme/wise"
        ranges = [asked for name, asked in hub.transfers if name.endswith(".safetensors")]
        assert ranges == (["bytes=500-"] if transfers else [])


def test_default_heads_of_other_organisations_are_not_pulled(
    hub: FakeHub, tmp_path: Path, tiny_llama: Path
) -> None:
    with pytest.raises(NotFoundError, match="--pull-org acme"):
        serve(
            tiny_llama, tmp_path / "store", default_medusa="acme/wise", pull_orgs=("other",)
        ).__enter__()
    assert not hub.transfers
