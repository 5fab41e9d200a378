"""Bounds on unfinished uploads: their number, their bytes, and what each of them costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.store import staging
from lorastack.adapters.store.registry import Registry, Upload
from lorastack.errors import AbortedError, InvalidArgumentError, Reason, ResourceExhaustedError
from tests.adapters.folders import accept, blob_names, reopen, send, sha256, specs_of, staged

SIZE = 100


def data_of(name: str) -> dict[str, bytes]:
    return {"x.json": name.encode(), "x.safetensors": name.encode() * SIZE}


def begin(registry: Registry, name: str, num_bytes: int, sender: str = "") -> Upload:
    """An upload of 100 bytes under a one-letter name, of which so many have come."""
    weights = data_of(name)["x.safetensors"][:SIZE]
    upload = registry.begin_upload(name, specs_of({"x.safetensors": weights}), sender=sender)
    start = upload.staged[sha256(weights)]
    upload.write(sha256(weights), start, weights[start : start + num_bytes])
    return upload


def here(registry: Registry, name: str) -> int:
    """Bytes of an unfinished upload that the store still has."""
    weights = data_of(name)["x.safetensors"][:SIZE]
    ((_, num_bytes),) = registry.plan_upload(name, specs_of({"x.safetensors": weights}))
    return num_bytes


def finish(registry: Registry, name: str) -> None:
    weights = data_of(name)["x.safetensors"][:SIZE]
    upload = registry.begin_upload(name, specs_of({"x.safetensors": weights}))
    send(upload, [weights])
    upload.commit(accept, base_fingerprint="base")


def test_nothing_is_made_before_the_first_byte(registry: Registry, root: Path) -> None:
    uploads = [registry.begin_upload(f"a{n}", specs_of(data_of("x"))) for n in range(3)]
    assert staged(root) == []
    uploads[0].write(sha256(b"x"), 0, b"")
    assert staged(root) == []
    uploads[0].write(sha256(b"x"), 0, b"x")
    (folder,) = (root / "staging").iterdir()
    assert [path.name for path in folder.iterdir()] == [sha256(b"x")]
    for upload in uploads:
        upload.suspend()
    assert len(staged(root)) == 1


def test_an_upload_walks_no_folders(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever others have left there, beginning and ending costs the same."""
    for name in "abcdef":
        begin(registry, name, 10).suspend()
    looked_at: list[Path] = []
    honest = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: looked_at.append(path) or honest(path))
    upload = begin(registry, "g", 10)
    assert looked_at == []
    upload.suspend()
    assert here(registry, "g") == 10
    assert looked_at == []
    assert registry.staging_bytes() == 70


def test_the_oldest_waiting_upload_makes_room(root: Path) -> None:
    registry = Registry(root, max_upload=SIZE, max_staged=250)
    for name in "abcd":
        begin(registry, name, 60, sender="1").suspend() if name != "c" else None
    running = begin(registry, "e", 60, sender="2")
    assert registry.staging_bytes() == 180  # the first one has gone
    assert [here(registry, name) for name in "abd"] == [0, 60, 60]
    begin(registry, "f", 90, sender="3")
    assert [here(registry, name) for name in "bd"] == [0, 60]
    finish(registry, "d")
    running.suspend()
    assert here(registry, "e") == 60
    registry.close()


def test_a_caller_has_half_the_room(root: Path) -> None:
    """The others' uploads are not dropped for one who brings much."""
    registry = Registry(root, max_upload=SIZE, max_staged=400)
    begin(registry, "z", 50, sender="2").suspend()
    for name in "abcdef":
        begin(registry, name, 90, sender="1").suspend()
    assert [here(registry, name) for name in "abcdef"] == [0, 0, 0, 0, 90, 90]
    assert here(registry, "z") == 50
    finish(registry, "z")
    registry.close()


def test_running_uploads_are_never_dropped(root: Path) -> None:
    registry = Registry(root, max_upload=SIZE, max_staged=200)
    running = [begin(registry, name, 90, sender=name) for name in "ab"]
    late = registry.begin_upload("c", specs_of({"x.safetensors": b"c" * SIZE}), sender="c")
    with pytest.raises(ResourceExhaustedError) as refusal:
        late.write(sha256(b"c" * SIZE), 0, b"c" * 30)
    assert refusal.value.reason is Reason.STAGING_FULL
    assert refusal.value.retry_after
    late.write(sha256(b"c" * SIZE), 0, b"c" * 20)  # this much there is
    late.suspend()
    for name, upload in zip("ab", running, strict=True):
        upload.write(sha256(name.encode() * SIZE), 90, name.encode() * 10)
        upload.commit(accept, base_fingerprint="base")
    finish(registry, "c")
    assert registry.staging_bytes() == 0
    registry.close()


def test_an_adapter_beyond_the_room_is_refused_at_once(root: Path) -> None:
    registry = Registry(root, max_upload=1000, max_staged=SIZE)
    with pytest.raises(InvalidArgumentError, match="at most 100"):
        registry.plan_upload("a", specs_of({"x.safetensors": b"x" * 101}))
    finish(registry, "a")
    registry.close()


def test_uploads_of_a_byte_do_not_push_out_large_ones(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be so many that wait; those go first that are sent again the soonest."""
    monkeypatch.setattr(staging, "MAX_WAITING", 4)
    begin(registry, "z", 50).suspend()
    for name in "abcdefgh":
        begin(registry, name, 1).suspend()
    assert len(staged(root)) == 4
    assert [here(registry, name) for name in "efgh"] == [0, 1, 1, 1]
    finish(registry, "z")
    assert "z" in {record.id for record in registry.list()}


def test_bounds_hold_for_what_an_earlier_run_left(
    registry: Registry, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other bounds may have held then, and older versions left folders of empty files."""
    for name in "abcdef":
        begin(registry, name, 30 if name == "c" else 50).suspend()
    (root / "staging" / "empty").mkdir()
    (root / "staging" / "empty" / sha256(b"")).touch()
    monkeypatch.setattr(staging, "MAX_WAITING", 5)
    registry = reopen(registry, root)
    assert (registry.recovery.kept_uploads, registry.recovery.expired_uploads) == (5, 2)
    assert [here(registry, name) for name in "abcdef"] == [50, 50, 0, 50, 50, 50]
    registry.close()
    registry = Registry(root, max_upload=SIZE, max_staged=120)
    assert registry.recovery.kept_uploads == 2
    assert registry.staging_bytes() == 100
    registry.close()


def test_their_number_is_the_busiest_callers_to_reduce(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MAX_WAITING", 4)
    begin(registry, "z", 1, sender="2").suspend()
    for name in "abcdefgh":
        begin(registry, name, 50, sender="1").suspend()
    assert here(registry, "z") == 1


def test_a_first_chunk_behind_what_is_here_can_be_planned_again(registry: Registry) -> None:
    """Between a plan and its upload what it counted on may have been dropped."""
    begin(registry, "a", 60).suspend()
    assert here(registry, "a") == 60
    registry._staging.close(
        staging.staging_key("a", specs_of({"x.safetensors": b"a" * SIZE})), keep=False
    )
    upload = registry.begin_upload("a", specs_of({"x.safetensors": b"a" * SIZE}))
    with pytest.raises(AbortedError) as refusal:
        upload.write(sha256(b"a" * SIZE), 60, b"a" * 40)
    assert refusal.value.reason is Reason.UPLOAD_INCOMPLETE


NAMES = st.sampled_from("abcdef")
ACTIONS = st.tuples(
    NAMES,
    st.sampled_from("123"),
    st.integers(1, SIZE),
    st.sampled_from(["leave", "suspend", "abort", "commit"]),
)


@given(actions=st.lists(ACTIONS, max_size=20), room=st.integers(SIZE, 4 * SIZE))
@settings(max_examples=20, deadline=None)
def test_bounds_hold_and_counts_are_true(
    tmp_path_factory: pytest.TempPathFactory,
    actions: list[tuple[str, str, int, str]],
    room: int,
) -> None:
    """Whatever is begun, broken off and finished, in any order, by anybody."""
    root = tmp_path_factory.mktemp("store")
    registry = Registry(root, max_upload=SIZE, max_staged=room)
    running: dict[str, Upload] = {}
    for name, sender, num_bytes, end in actions:
        weights = name.encode() * SIZE
        key = sha256(weights)
        upload = registry.begin_upload(name, specs_of({"x.safetensors": weights}), sender=sender)
        running[name] = upload
        try:
            if key in upload.needed:
                start = upload.staged[key]
                upload.write(key, start, weights[start : start + num_bytes])
            if end == "commit" and not upload.num_missing:
                upload.commit(accept, base_fingerprint="base")
        except ResourceExhaustedError as error:
            assert error.reason is Reason.STAGING_FULL
        if end == "suspend":
            upload.suspend()
        elif end == "abort":
            upload.abort()
        on_disk = sum(path.stat().st_size for path in (root / "staging").rglob("*/*"))
        assert registry.staging_bytes() == on_disk <= room
    for upload in running.values():
        upload.abort()
    assert len(staged(root)) <= len(set("abcdef"))
    registry = reopen(registry, root)
    for name in "abcdef":
        finish(registry, name)
    assert blob_names(root) == {sha256(name.encode() * SIZE) for name in "abcdef"}
    assert registry.staging_bytes() == 0
    assert staged(root) == []
    registry.close()
