"""AdapterService: uploads that store all or nothing, look-ups, paging, deletion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from lorastack.adapters.store.manifest import Manifest, Record
from lorastack.client import Client, to_error
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.service.adapters import messages
from lorastack.v1 import adapters_pb2 as ab
from lorastack.v1 import adapters_pb2_grpc
from lorastack.v1 import generation_pb2 as pb
from tests.adapters.folders import FACTS
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer

Folders = dict[str, Path]


@pytest.fixture
def stub(fake: RunningServer) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    with grpc.insecure_channel(fake.address) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


def refusal(fake: RunningServer, call: object, *arguments: object) -> LorastackError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)  # type: ignore[operator]
    return to_error(caught.value, fake.address)


def test_upload_show_list_delete(client: Client, folders: Folders) -> None:
    lora = client.upload(folders["lora"], "team/lora")
    assert (lora.id, lora.kind, lora.revision, lora.rank) == ("team/lora", ab.Adapter.LORA, 1, 8)
    assert lora.digest.startswith("sha256:")
    assert list(lora.target_modules) == ["q_proj"]
    assert lora.compatible
    assert lora.residency == ab.Adapter.DISK
    assert lora.size_bytes == sum(path.stat().st_size for path in folders["lora"].iterdir())
    assert lora.created_at.seconds > 1_600_000_000
    heads = client.upload(folders["heads"], "heads")
    assert (heads.kind, heads.num_heads, heads.medusa_version) == (ab.Adapter.MEDUSA, 3, 2)
    bundle = client.upload(folders["bundle"], "bundle")
    assert bundle.kind == ab.Adapter.LORA_WITH_MEDUSA
    assert client.get_adapter("team/lora") == lora
    assert client.get_adapter(f"team/lora@{lora.digest}") == lora
    assert client.list_adapters() == [bundle, heads, lora]
    assert client.list_adapters("team/") == [lora]
    client.delete_adapter("heads")
    assert client.list_adapters() == [bundle, lora]
    for call in (client.get_adapter, client.delete_adapter):
        with pytest.raises(NotFoundError, match="heads") as unknown:
            call("heads")
        assert unknown.value.metadata["request_id"]


def test_a_base_of_any_name_can_be_shown() -> None:
    """Stores of older versions may hold terminal commands, and what no message can hold."""
    manifest = Manifest(
        digest="sha256:0",
        files=(),
        facts=replace(FACTS, base_model="\x1b[31m\ud800/tiny"),
        base_fingerprint="",
    )
    record = Record(id="odd", revision=1, created_at=0.0, manifest=manifest, other_files=())
    usage = messages.AdapterUsage(on_device={}, on_host=(), in_flight={}, last_used={})
    shown = messages.adapter(record, compatible=True, usage=usage)
    assert shown.base_model == "\\x1b[31m\\ud800/tiny"


def test_a_new_revision(client: Client, folders: Folders) -> None:
    first = client.upload(folders["lora"], "x")
    again = client.upload(folders["lora"], "x")
    assert (again.revision, again.digest) == (1, first.digest)  # the same bytes change nothing
    second = client.upload(folders["other"], "x", if_digest=first.digest)
    assert (second.revision, second.id) == (2, "x")
    with pytest.raises(AbortedError):
        client.upload(folders["lora"], "x", if_digest=first.digest)
    with pytest.raises(AlreadyExistsError):
        client.upload(folders["lora"], "x", if_digest="")
    assert client.get_adapter("x") == second


def test_paging(
    client: Client, folders: Folders, stub: adapters_pb2_grpc.AdapterServiceStub
) -> None:
    names = [f"a{index}" for index in range(5)]
    for name in reversed(names):
        client.upload(folders["lora"], name)
    seen: list[list[str]] = []
    request = ab.ListAdaptersRequest(page_size=2)
    while True:
        page = stub.ListAdapters(request)
        seen.append([adapter.id for adapter in page.adapters])
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == [["a0", "a1"], ["a2", "a3"], ["a4"]]
    assert not stub.ListAdapters(ab.ListAdaptersRequest(page_size=5)).next_page_token


def test_a_foreign_page_token_is_refused(
    fake: RunningServer, stub: adapters_pb2_grpc.AdapterServiceStub
) -> None:
    for token in ("%%%", "é", "_w=="):
        error = refusal(fake, stub.ListAdapters, ab.ListAdaptersRequest(page_token=token))
        assert type(error) is InvalidArgumentError


def test_where_an_adapter_is(client: Client, folders: Folders, fake: RunningServer) -> None:
    digest = client.upload(folders["lora"], "x").digest
    fake.host.copies[digest] = 1000
    assert client.get_adapter("x").residency == ab.Adapter.HOST
    fake.pool.put(digest, 2000, pinned=True)
    fake.pool.last_used[digest] = 1_700_000_000.25
    fake.engine.hold()
    running = client.stream(
        pb.GenerateRequest(prompt="a", lora_id="x", stop=pb.StopParams(max_new_tokens=2))
    )
    fake.engine.wait(lambda: bool(fake.engine.rows))
    adapter = client.get_adapter("x")
    assert (adapter.residency, adapter.device_bytes) == (ab.Adapter.DEVICE, 2000)
    assert (adapter.in_flight, adapter.pinned) == (1, True)
    assert adapter.last_used_at.ToNanoseconds() == 1_700_000_000_250_000_000
    fake.engine.go_on()
    assert list(running)[-1].final.adapters.loras[0].digest == digest
    assert client.get_adapter("x").in_flight == 0


def test_revisions_and_rollback(client: Client, folders: Folders, fake: RunningServer) -> None:
    first = client.upload(folders["lora"], "x")
    second = client.upload(folders["other"], "x")
    assert client.list_revisions("x") == [second, first]
    third = client.rollback("x", first.digest)
    assert (third.revision, third.digest) == (3, first.digest)
    assert client.get_adapter("x") == third
    assert [each.revision for each in client.list_revisions("x")] == [3, 2, 1]
    assert client.get_adapter(f"x@{second.digest}").digest == second.digest
    for call in (
        lambda: client.rollback("x", "sha256:" + "0" * 64),
        lambda: client.rollback("y", first.digest),
        lambda: client.list_revisions("y"),
    ):
        with pytest.raises(NotFoundError):
            call()


def test_what_no_id_points_to_leaves_memory(
    client: Client, folders: Folders, fake: RunningServer
) -> None:
    forgotten = fake.engine.forgotten
    first = client.upload(folders["lora"], "x").digest
    client.upload(folders["lora"], "twin")
    second = client.upload(folders["other"], "x").digest
    assert forgotten == []  # the twin still points to the first
    client.rollback("x", first)
    assert forgotten == [second]
    client.upload(folders["lora"], "x")
    client.delete_adapter("twin")
    assert forgotten == [second]
    client.delete_adapter("x")
    assert sorted(forgotten[1:]) == sorted([first, second])


def test_load_and_unload(client: Client, folders: Folders, fake: RunningServer) -> None:
    digest = client.upload(folders["lora"], "x").digest
    loaded = client.load("x")
    assert (loaded.residency, loaded.pinned) == (ab.Adapter.DEVICE, False)
    assert client.load(f"x@{digest}", pin=True).pinned
    unloaded = client.unload("x")
    assert (unloaded.residency, unloaded.pinned) == (ab.Adapter.DISK, False)
    for call in (client.load, client.unload):
        with pytest.raises(NotFoundError):
            call("y")


@pytest.mark.parametrize("refusal", [None, ResourceExhaustedError("full")])
def test_what_is_deleted_while_it_is_loaded_is_forgotten_after_that(
    client: Client, folders: Folders, fake: RunningServer, refusal: LorastackError | None
) -> None:
    digest = client.upload(folders["lora"], "x").digest
    writer, load = fake.server._adapters._writer, fake.engine.load

    def load_late(digest: str, pin: bool, needs: Sequence[str]) -> Future[None]:
        writer.delete("x", ())
        fake.engine.refusal = refusal
        return load(digest, pin, needs)

    fake.engine.load = load_late  # type: ignore[method-assign]
    with pytest.raises(NotFoundError if refusal is None else ResourceExhaustedError):
        client.load("x", pin=True)
    client.prune_revisions()  # the store's one thread has done what it was told before
    assert fake.engine.forgotten == [digest, digest]
    assert not fake.pool.residents
    client.upload(folders["lora"], "y")
    writer.forget_deleted(digest)  # an upload of the same came between
    assert fake.engine.forgotten == [digest, digest]


def test_memory_full_of_pins_names_their_ids(
    client: Client, folders: Folders, fake: RunningServer
) -> None:
    pinned = client.upload(folders["lora"], "team/pinned").digest
    client.upload(folders["other"], "x")
    nobodys = "sha256:" + "0" * 64

    def refusal() -> ResourceExhaustedError:
        return ResourceExhaustedError(
            "no room", reason=Reason.DEVICE_MEMORY_PINNED, digests=f"{nobodys},{pinned}"
        )

    fake.engine.refusal = refusal()
    with pytest.raises(ResourceExhaustedError, match="team/pinned") as caught:
        client.load("x")
    assert caught.value.reason is Reason.DEVICE_MEMORY_PINNED
    assert caught.value.metadata["adapter_ids"] == f"{nobodys}, team/pinned"
    fake.engine.failure = refusal()
    with pytest.raises(ResourceExhaustedError, match="team/pinned"):
        client.generate(pb.GenerateRequest(prompt="a", lora_id="x"))


def test_another_base_models_adapter_is_listed_and_not_loaded(
    client: Client, folders: Folders, start_fake: StartFake, fake: RunningServer
) -> None:
    client.upload(folders["lora"], "x")
    client.upload(folders["heads"], "heads")
    client.set_default_medusa("heads")
    fake.stop()
    later = start_fake(store=fake.registry._root, fingerprint="sha256:" + "cd" * 32)
    with Client(later.address) as now:
        assert [adapter.compatible for adapter in now.list_adapters()] == [False, False]
        with pytest.raises(FailedPreconditionError, match="another base model") as caught:
            now.load("x")
        assert caught.value.reason is Reason.BASE_MODEL_DIFFERS
        assert now.model_info().default_medusa_id == ""
        assert now.generate(pb.GenerateRequest(prompt="a")).adapters.medusa_id == ""


def test_default_heads_are_kept(
    client: Client, folders: Folders, fake: RunningServer, start_fake: StartFake
) -> None:
    digest = client.upload(folders["heads"], "heads").digest
    client.upload(folders["lora"], "lora")
    chosen = client.set_default_medusa("heads")
    assert (chosen.medusa_id, chosen.medusa_digest) == ("heads", digest)
    assert client.generate(pb.GenerateRequest(prompt="a")).adapters.medusa_digest == digest
    with pytest.raises(InvalidArgumentError, match="without Medusa heads"):
        client.set_default_medusa("lora")
    with pytest.raises(NotFoundError):
        client.set_default_medusa("nobody")
    with pytest.raises(FailedPreconditionError, match="heads") as caught:
        client.delete_adapter("heads")
    assert caught.value.reason is Reason.ADAPTER_IN_USE
    fake.stop()
    later = start_fake(store=fake.registry._root)
    with Client(later.address) as now:
        assert now.model_info().default_medusa_digest == digest
        assert now.set_default_medusa("").medusa_id == ""
        assert now.generate(pb.GenerateRequest(prompt="a")).adapters.medusa_id == ""
        now.delete_adapter("heads")


def test_what_takes_an_id_refuses_a_revision_and_nothing(client: Client, folders: Folders) -> None:
    digest = client.upload(folders["heads"], "heads").digest
    for wrong in (f"heads@{digest}", ""):
        with pytest.raises(InvalidArgumentError, match="is not an adapter id"):
            client.upload(folders["lora"], wrong)
        with pytest.raises(NotFoundError, match=f"no adapter '{wrong}'"):
            client.list_revisions(wrong)
        with pytest.raises(NotFoundError, match=f"no adapter '{wrong}'"):
            client.rollback(wrong, digest)
        with pytest.raises(NotFoundError, match=f"no adapter '{wrong}'"):
            client.delete_adapter(wrong)
        if wrong:  # for a prune, no id means all of them
            with pytest.raises(NotFoundError, match=f"no adapter '{wrong}'"):
                client.prune_revisions(wrong, keep=1)
    client.set_default_medusa(f"heads@{digest}")
    with pytest.raises(NotFoundError, match="no adapter"):
        client.delete_adapter(f"heads@{digest}")
    assert client.get_adapter("heads").digest == digest


def test_the_flag_wins_over_the_store(
    client: Client, folders: Folders, fake: RunningServer, start_fake: StartFake
) -> None:
    client.upload(folders["heads"], "heads")
    client.upload(folders["bundle"], "bundle")
    client.set_default_medusa("bundle")
    fake.stop()
    flagged = start_fake(store=fake.registry._root, default_medusa="heads")
    with Client(flagged.address) as now:
        assert now.model_info().default_medusa_id == "heads"
        with pytest.raises(FailedPreconditionError, match="--medusa heads") as caught:
            now.set_default_medusa("bundle")
        assert caught.value.reason is Reason.DEFAULT_IS_FIXED
        with pytest.raises(FailedPreconditionError, match="restart"):
            now.delete_adapter("heads")


def test_old_revisions_go(start_fake: StartFake, folders: Folders) -> None:
    """But not what requests and pins use."""
    fake = start_fake(keep_revisions=2)
    with Client(fake.address) as client:
        first = client.upload(folders["lora"], "x")
        second = client.upload(folders["other"], "x")
        assert client.load(f"x@{first.digest}", pin=True).pinned
        for _ in range(5):
            client.upload(folders["bundle"], "x")
            client.rollback("x", second.digest.removeprefix("sha256:")[:8])
        kept = {revision.digest for revision in client.list_revisions("x")}
        assert kept == {first.digest, second.digest, client.upload(folders["bundle"], "y").digest}
        client.unload(f"x@{first.digest}")
        stored, _ = client.disk_usage()
        pruned = client.prune_revisions("x", keep=1)
        assert pruned.removed_revisions == len(kept) - 1
        assert client.disk_usage()[0] == stored - pruned.freed_bytes < stored
        assert [r.digest for r in client.list_revisions("x")] == [second.digest]
        assert first.digest in fake.engine.forgotten
        with pytest.raises(NotFoundError, match="adapters revisions x"):
            client.get_adapter(f"x@{first.digest}")
        with pytest.raises(InvalidArgumentError, match="at least 1"):
            client.prune_revisions(keep=0)


def test_another_base_models_name(client: Client, folders: Folders, tmp_path: Path) -> None:
    for path in folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "adapter_config.json"
    text = config.read_text().replace("{", '{"base_model_name_or_path": "other/base",', 1)
    config.write_text(text)
    with pytest.raises(FailedPreconditionError, match="--accept-base") as caught:
        client.upload(tmp_path, "x")
    assert caught.value.reason is Reason.BASE_MODEL_DIFFERS
    accepted = client.upload(tmp_path, "x", accept_base=True)
    assert (accepted.base_model, accepted.compatible) == ("other/base", True)
