"""Adapters from a Hugging Face hub and to one, by the huggingface-hub library.

HF_ENDPOINT names another hub, as for every user of that library. A server pulls as nobody unless
the call brings a token: its own login is not lent to its clients.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from lorastack.adapters.sources.base import (
    Alive,
    Limits,
    Pieces,
    Source,
    SourceFile,
    check_limits,
    describe,
    pieces_of,
)
from lorastack.adapters.store.durable import disk_full_is_exhaustion
from lorastack.adapters.store.manifest import FileSpec
from lorastack.config import MIB
from lorastack.errors import (
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    UnavailableError,
)
from lorastack.folders import Choice, choose

TIMEOUT = 10.0  # seconds without a byte; a stopping server waits so long for its pulls at most
IN_MEMORY = MIB  # bytes of a small file before it goes to a temporary one
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[!-~]{1,200}")
_TOKEN = re.compile(r"[!-~]{0,1000}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubAddress:
    """What to pull. revision: branch, tag or commit. token: never shown; "" pulls as nobody."""

    hub_id: str
    revision: str = "main"
    token: str = ""

    def __post_init__(self) -> None:
        """Raises InvalidArgumentError for what cannot be one; the token's text is not repeated."""
        check_hub_id(self.hub_id)
        if not _REVISION.fullmatch(self.revision):
            raise InvalidArgumentError("revision must be a branch, a tag or a commit of the hub")
        if not _TOKEN.fullmatch(self.token):
            raise InvalidArgumentError("token must be printable ASCII, as the hub gave it")

    def __repr__(self) -> str:
        return f"{self.hub_id}@{self.revision}"


def check_hub_id(hub_id: str) -> None:
    """Raises InvalidArgumentError unless it is organisation/name."""
    if not _HUB_ID.fullmatch(hub_id):
        raise InvalidArgumentError(
            f"{hub_id[:200]!r} is not a hub id; write organisation/name", field="hub_id"
        )


@contextmanager
def open_hub(
    address: HubAddress, organisations: Collection[str], limits: Limits, alive: Alive
) -> Iterator[Source]:
    """The files of an adapter at the commit that the revision names now.

    Files that the hub keeps in large-file storage come with their sha256, so they are fetched when
    read and only then; the small ones are fetched here. Raises PermissionDeniedError for other
    organisations, InvalidArgumentError for repositories without weights or beyond the limits,
    ResourceExhaustedError when the disk of temporary files is full, and what `_hub_errors` raises.
    """
    _check_organisation(address.hub_id, organisations)
    with _hub_errors(address.hub_id):
        info = HfApi(endpoint=_endpoint(), token=address.token or False).model_info(
            address.hub_id, revision=address.revision, files_metadata=True, timeout=TIMEOUT
        )
    # A repository that moved is answered from its new place.
    _check_organisation(info.id, organisations)
    stored = {file.rfilename: file for file in info.siblings or ()}
    choice = _choose(stored, address.hub_id)
    chosen = [stored[name] for name in choice.files]
    check_limits([_size(file, address) for file in chosen], limits, address.hub_id)
    # Files of two commits are never mixed.
    commit = HubAddress(
        hub_id=address.hub_id, revision=info.sha or address.revision, token=address.token
    )
    with ExitStack() as open_files:
        files = [_source_file(file, commit, open_files, alive) for file in chosen]
        yield Source(files=files, left_out=choice.left_out)


def push_folder(
    folder: Path, hub_id: str, *, private: bool = False, token: str | None = None
) -> str:
    """Uploads a folder's files to a repository, creating it if need be; returns the commit's URL.

    token: None takes the user's own, as `hf auth login` or HF_TOKEN gave it. Raises
    InvalidArgumentError and what `_hub_errors` raises.
    """
    check_hub_id(hub_id)
    api = HfApi(endpoint=_endpoint(), token=token)
    with _hub_errors(hub_id):
        # None: as the organisation's settings say.
        api.create_repo(hub_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=hub_id, folder_path=folder, commit_message="Upload adapter with lorastack"
        )
    return commit.commit_url


def _choose(paths: Collection[str], hub_id: str) -> Choice:
    """An adapter's files among a repository's paths, which name its folders' files too."""
    inner: dict[str, list[str]] = {}
    for path in paths:
        folder, slash, name = path.partition("/")
        if slash:
            inner.setdefault(folder + slash, []).append(name)
    top = [path for path in paths if "/" not in path]
    return choose([*top, *inner], hub_id, lambda name: inner[name])


def _source_file(
    file: RepoSibling, address: HubAddress, open_files: ExitStack, alive: Alive
) -> SourceFile:
    name, size = file.rfilename, _size(file, address)
    remote = partial(_fetch, address, name, size)
    if file.lfs is not None:
        return SourceFile(spec=FileSpec(name=name, size=size, sha256=file.lfs.sha256), read=remote)
    temporary = open_files.enter_context(tempfile.SpooledTemporaryFile(IN_MEMORY))  # noqa: SIM115
    copy = cast(BinaryIO, temporary)
    folder = tempfile.gettempdir()
    with disk_full_is_exhaustion(
        f"the disk of {folder}, where a pull keeps {name}, is full: free some space, or start the "
        "server with a TMPDIR that has more"
    ):
        spec = describe(name, size, _copied(remote(0), copy), alive)
    return SourceFile(spec=spec, read=partial(pieces_of, copy, size))


def _fetch(address: HubAddress, name: str, size: int, offset: int) -> Pieces:
    """The bytes of a file from an offset on, size - offset in all."""
    url = hf_hub_url(address.hub_id, name, revision=address.revision, endpoint=_endpoint())
    headers = build_hf_headers(token=address.token or False)
    headers["Accept-Encoding"] = "identity"  # a range of the file, not of its compressed form
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with (
        _hub_errors(address.hub_id),
        get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response,
    ):
        hf_raise_for_status(response)
        if offset and response.status_code != 206:
            raise _failed(address.hub_id, f"{name}: it does not continue a transfer")
        for piece in response.iter_bytes():  # as they come: a slow hub must not hide a caller's end
            offset += len(piece)
            if offset > size:
                break
            yield piece
    if offset != size:
        raise _failed(address.hub_id, f"{name} is not the {size} bytes that it announced")


def _copied(pieces: Pieces, copy: BinaryIO) -> Pieces:
    with closing(pieces):
        for piece in pieces:
            copy.write(piece)
            yield piece


def _check_organisation(hub_id: str, organisations: Collection[str]) -> None:
    """The hub takes organisations in any case, so case is no way around."""
    organisation = hub_id.partition("/")[0]
    if organisation.casefold() not in {allowed.casefold() for allowed in organisations}:
        allowed = ", ".join(organisations) or "no organisation"
        raise PermissionDeniedError(
            f"this server pulls from {allowed} of the hub, not from {organisation[:100]!r}; "
            "whoever runs it allows more with --pull-org ORG",
            hub_id=hub_id,
        )


def _size(file: RepoSibling, address: HubAddress) -> int:
    size = file.size if file.lfs is None else file.lfs.size
    if size is None:
        raise _failed(address.hub_id, f"it does not say how large {file.rfilename} is")
    return size


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turns the library's errors into NotFoundError, PermissionDeniedError or UnavailableError.

    Their texts hold addresses that may be signed, so only the status travels on.
    """
    try:
        yield
    except HfHubHTTPError as error:
        raise _refused(hub_id, error) from error
    except (HTTPError, OSError, KeyError, TypeError, ValueError) as error:
        # No connection, one cut short, or an answer that is not the hub's.
        raise _failed(hub_id, type(error).__name__) from error


def _refused(hub_id: str, error: HfHubHTTPError) -> LorastackError:
    status = error.response.status_code
    missing = error.response.headers.get("X-Error-Code", "").endswith("NotFound")
    if status == 404 or (missing and not isinstance(error, GatedRepoError)):
        return NotFoundError(
            f"the hub shows no such {hub_id} or revision of it; if it is private, give a token "
            "that may read it",
            hub_id=hub_id,
        )
    if status in (401, 403):
        return PermissionDeniedError(
            f"the hub does not let {hub_id} be read or written with this token or without one; "
            "give a token that may, and accept its conditions on the hub if it has some",
            reason=Reason.HUB_FAILED,
            hub_id=hub_id,
        )
    return _failed(hub_id, f"status {status}")


def _failed(hub_id: str, why: str) -> UnavailableError:
    return UnavailableError(
        f"the hub failed at {hub_id} ({why}); try again",
        reason=Reason.HUB_FAILED,
        hub_id=hub_id,
    )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
