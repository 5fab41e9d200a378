"""Fetching one wheel of the package index, resumably, by pip's own configuration."""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lorastack.errors import FailedPreconditionError, Reason

Progress = Callable[[int, int], None]  # bytes done, bytes in all

CHUNK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
MAX_FAILURES = 5  # in a row, without a byte between them


class DownloadError(FailedPreconditionError):
    """A file that cannot be had. The message ends with what to do."""

    default_reason = Reason.INVALID_MODEL


def find_wheel(project: str, filename: str) -> str:
    """The URL of a wheel, as pip finds it with this environment's index settings.

    pip prints no passwords, so an index that wants one needs the wheel placed by hand.
    Raises DownloadError.
    """
    command = [sys.executable, "-m", "pip", "index", "versions", project, "-vvv", "--no-color"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    link = re.search(rf"Found link (\S+/{re.escape(filename)})", result.stdout)
    if link is None:
        errors = result.stderr.strip().splitlines() or ["no such link"]
        raise DownloadError(f"pip finds no {filename} ({errors[-1]})")
    return link[1]


def fetch(
    find_url: Callable[[], str], target: Path, sha256: str, progress: Progress | None = None
) -> None:
    """Make `target` the file with this sha256. Does nothing when it is there already.

    What an earlier try left in `target`.part is continued. Raises DownloadError after several
    failures in a row (the part is kept), or when the whole file has another digest (it is not).
    One process at a time: callers hold a lock.
    """
    if target.is_file() and _sha256(target) == sha256:
        return
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    url = find_url()
    failures = 0
    while True:
        before = _size(part)
        try:
            if _continue(url, part, progress) or _sha256(part) == sha256:
                break
            failure = "the connection was cut"
        except (OSError, HTTPException) as error:
            failure = str(error) or type(error).__name__
        failures = 1 if _size(part) > before else failures + 1
        if failures == MAX_FAILURES:
            raise DownloadError(f"{target.name} cannot be downloaded: {failure}")
    if _sha256(part) != sha256:
        part.unlink()
        raise DownloadError(f"{target.name} was downloaded, but is not the expected file")
    part.replace(target)


def _continue(url: str, part: Path, progress: Progress | None) -> bool:
    """Append to `part` what is missing. True when it is whole, as far as the server tells its
    length; without one there is no progress to report.
    """
    start = _size(part)
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT, context=_tls())
    except HTTPError as error:
        if error.code != 416:  # nothing behind `start`: whole already, or not ours
            raise
        return True
    with response, part.open("ab") as out:
        if start and response.status != 206:  # the server starts over
            out.truncate(0)
            start = 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length and length.isdecimal() else None
        return _copy(response, out, start, total, progress) == total


def _copy(
    response: HTTPResponse, out: BinaryIO, done: int, total: int | None, progress: Progress | None
) -> int:
    while data := response.read(CHUNK):
        out.write(data)
        done += len(data)
        if progress is not None and total is not None:
            progress(done, total)
    return done


def _tls() -> ssl.SSLContext:
    """The certificates pip is told to trust, else the system's."""
    return ssl.create_default_context(
        cafile=os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE")
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
