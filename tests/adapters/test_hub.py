"""Files from a hub: pinned to a commit, fetched once, refused in words; and a folder pushed."""

from __future__ import annotations

import errno
import hashlib
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack.adapters.sources.base import Limits
from lorastack.adapters.sources.hub import HubAddress, open_hub, push_folder
from lorastack.errors import (
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.helpers.fake_hub import PATIENCE, FakeHub, Repo

WEIGHTS = bytes(range(256)) * 8192  # 2 MiB: several pieces
FILES = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": WEIGHTS,
    "chat_template.jinja": b"{{ x }}",
    "README.md": b"# it",
}
CLUTTER = {
    ".gitattributes": b"*",
    "optimizer.pt": b"pickle",
    "adapter_model.bin": b"pickle",
    "trainer.py": b"code",
    "checkpoint-500/adapter_model.safetensors": b"old",
}
ROOMY = Limits(max_files=8, max_bytes=len(WEIGHTS) + 1000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def alive() -> None:
    pass


def pull(
    hub_id: str = "acme/lora",
    revision: str = "main",
    token: str = "",
    limits: Limits = ROOMY,
    organisations: tuple[str, ...] = ("acme",),
) -> dict[str, bytes]:
    """Name -> bytes of everything, read as a pull would."""
    address = HubAddress(hub_id=hub_id, revision=revision, token=token)
    with open_hub(address, organisations, limits, alive) as source:
        found = {file.spec.name: b"".join(file.read(0)) for file in source.files}
        for file in source.files:
            assert file.spec.sha256 == hashlib.sha256(found[file.spec.name]).hexdigest()
            assert file.spec.size == len(found[file.spec.name])
    return found


def refusal(kind: type[LorastackError], *arguments: object, **options: object) -> LorastackError:
    with pytest.raises(kind) as caught:
        pull(*arguments, **options)  # type: ignore[arg-type]
    return caught.value


@pytest.mark.parametrize("large", [True, False], ids=["large-file storage", "all in git"])
def test_what_an_adapter_needs_is_fetched_once(hub: FakeHub, large: bool) -> None:
    if not large:
        hub.large = ()
    hub.add("acme/lora", FILES | CLUTTER)
    assert pull() == FILES
    assert sorted(name for name, _ in hub.transfers) == sorted(FILES)


def test_reading_goes_on_from_an_offset(hub: FakeHub) -> None:
    hub.add("acme/lora", FILES)
    with open_hub(HubAddress(hub_id="acme/lora"), ["acme"], ROOMY, alive) as source:
        for file in source.files:
            whole = FILES[file.spec.name]
            for offset in (0, 1, len(whole) // 2, len(whole) - 1):
                assert b"".join(file.read(offset)) == whole[offset:]
    assert ("adapter_model.safetensors", f"bytes={len(WEIGHTS) // 2}-") in hub.transfers


def test_what_is_left_out_is_named(hub: FakeHub) -> None:
    hub.add("acme/lora", FILES | CLUTTER)
    with open_hub(HubAddress(hub_id="acme/lora"), ["acme"], ROOMY, alive) as source:
        assert source.left_out == (
            *(".gitattributes", "adapter_model.bin", "checkpoint-500/", "optimizer.pt"),
            "trainer.py",
        )
    hub.add("acme/pickled", CLUTTER)
    assert "adapters convert" in refusal(InvalidArgumentError, "acme/pickled").message
    hub.add("acme/deep", {f"{name}/adapter_config.json": b"{}" for name in ("a", "b")})
    assert "(a, b)" in refusal(InvalidArgumentError, "acme/deep").message


def test_all_files_are_of_one_commit(hub: FakeHub) -> None:
    repo = hub.add("acme/lora", FILES)
    changed = FILES | {"adapter_model.safetensors": b"later"}
    with open_hub(HubAddress(hub_id="acme/lora"), ["acme"], ROOMY, alive) as source:
        repo.commit(changed)
        assert {file.spec.name: b"".join(file.read(0)) for file in source.files} == FILES
    assert pull() == changed


def test_revisions(hub: FakeHub) -> None:
    repo = hub.add("acme/lora", FILES)
    first = repo.revisions["main"]
    tagged = FILES | {"README.md": b"tagged"}
    repo.commit(tagged, "v1/rc")
    repo.commit(FILES | {"README.md": b"newest"})
    assert pull(revision="v1/rc") == tagged
    assert pull(revision=first) == FILES
    error = refusal(NotFoundError, revision="v2")
    assert "acme/lora" in error.message


def test_only_allowed_organisations(hub: FakeHub) -> None:
    hub.add("evil/lora", FILES)
    hub.add("acme/lora", FILES)
    error = refusal(PermissionDeniedError, "evil/lora")
    assert "--pull-org" in error.message
    assert error.reason is Reason.PULL_NOT_ALLOWED
    assert hub.transfers == []
    assert pull("acme/lora", organisations=("ACME",)) == FILES
    fetched = list(hub.transfers)
    # A repository that was moved to somebody else does not bring that somebody in.
    hub.repos["acme/lora"] = Repo(moved_to="evil/lora")
    refusal(PermissionDeniedError)
    assert hub.transfers == fetched


def test_tokens_open_what_is_private_and_stay_at_the_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/lora", FILES, private=True)
    hub.add("acme/gated", FILES, gated=True)
    assert "token" in refusal(NotFoundError).message
    assert "token" in refusal(PermissionDeniedError, "acme/gated").message
    assert pull(token=hub.token) == pull("acme/gated", token=hub.token) == FILES
    assert hub.to_storage == {None}
    # The server's own login is not lent to its callers.
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.to_hub.clear()
    refusal(NotFoundError)
    hub.add("acme/open", FILES)
    assert pull("acme/open") == FILES
    assert hub.to_hub == {None}


def test_a_token_is_never_shown(hub: FakeHub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    hub.add("acme/lora", FILES, private=True)
    pull(token=hub.token)
    hub.status = 500
    error = refusal(UnavailableError, token=hub.token)
    shown = [error.message, repr(error), str(error.metadata), caplog.text]
    shown.append(repr(HubAddress(hub_id="acme/lora", token=hub.token)))
    shown.append(refusal(InvalidArgumentError, token=hub.token + "\u00e9\n").message)
    assert not [text for text in shown if hub.token in text]


def test_limits_hold_before_anything_is_fetched(hub: FakeHub) -> None:
    hub.add("acme/lora", FILES)
    for limits in (
        Limits(max_files=len(FILES) - 1, max_bytes=1 << 30),
        Limits(max_files=64, max_bytes=sum(map(len, FILES.values())) - 1),
    ):
        refusal(InvalidArgumentError, limits=limits)
    assert hub.transfers == []


def test_a_repository_without_weights_says_what_helps(hub: FakeHub) -> None:
    hub.add("acme/lora", {"config.json": b"{}", "medusa_lm_head.pt": b"pickle"})
    error = refusal(InvalidArgumentError)
    assert "medusa_lm_head.pt" in error.message
    assert "lorastack adapters convert" in error.message
    assert hub.transfers == []


@pytest.mark.parametrize(
    "bad", ["", "lora", "a/b/c", "../x", "acme/..\0", "acme/lo ra", "-a/b", "acme/" + "x" * 99]
)
def test_malformed_hub_ids(bad: str) -> None:
    assert refusal(InvalidArgumentError, bad).metadata["field"] == "hub_id"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failing_hub(hub: FakeHub, status: int) -> None:
    hub.status = status
    error = refusal(UnavailableError)
    assert error.reason is Reason.HUB_FAILED
    assert str(status) in error.message


def test_a_transfer_cut_short(hub: FakeHub) -> None:
    hub.add("acme/lora", FILES)
    hub.cut = 100_000
    assert refusal(UnavailableError).reason is Reason.HUB_FAILED


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert refusal(UnavailableError).reason is Reason.HUB_FAILED


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_hub_that_announces_another_size(hub: FakeHub, name: str, change: int) -> None:
    hub.add("acme/lora", FILES)
    hub.misreported[name] = len(FILES[name]) + change
    error = refusal(UnavailableError)
    assert name in error.message
    assert error.reason is Reason.HUB_FAILED


def test_no_more_is_read_than_was_announced(hub: FakeHub) -> None:
    hub.add("acme/lora", FILES)
    name = "adapter_model.safetensors"
    hub.misreported[name] = 1000
    with open_hub(HubAddress(hub_id="acme/lora"), ["acme"], ROOMY, alive) as source:
        weights = next(file for file in source.files if file.spec.name == name)
        got = []
        with pytest.raises(UnavailableError, match=name):
            got += weights.read(0)
    assert sum(map(len, got)) <= 1000


def test_a_reader_who_has_gone_closes_the_connection(hub: FakeHub) -> None:
    def gone() -> None:
        raise RequestCancelledError("gone")

    hub.large = ()
    hub.add("acme/lora", {"adapter_model.safetensors": WEIGHTS})
    hub.hold.clear()
    with (
        pytest.raises(RequestCancelledError) as held,
        open_hub(HubAddress(hub_id="acme/lora"), ["acme"], ROOMY, gone),
    ):
        pytest.fail("entered")
    assert hub.ended_early.wait(PATIENCE)
    del held  # until here its traceback kept alive what was not closed


def test_a_full_disk_of_temporary_files_is_not_the_stores(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    hub.large = ()
    hub.add("acme/lora", FILES)
    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", lambda size: FullDisk())
    error = refusal(ResourceExhaustedError)
    assert error.reason is Reason.STORE_FULL
    assert tempfile.gettempdir() in error.message and "TMPDIR" in error.message
    assert "store's disk" not in error.message


def test_push_creates_and_replaces(hub: FakeHub, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    url = push_folder(tmp_path, "me/lora", private=True, token=hub.token)
    repo = hub.repos["me/lora"]
    assert repo.private
    assert url.endswith(repo.revisions["main"])
    assert pull("me/lora", token=hub.token, organisations=("me",)) == FILES
    with pytest.raises(PermissionDeniedError):
        push_folder(tmp_path, "me/lora", token="hf_wrong")
    with pytest.raises(InvalidArgumentError):
        push_folder(tmp_path, "lora")


def test_a_push_to_nobody_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"try again$"):
        push_folder(tmp_path, "me/lora", token=FakeHub.token)
