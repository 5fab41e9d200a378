"""The upload at a training's end, and what is asked of the server before hours go into it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorastack.adapters.store.manifest import adapter_digest, file_spec
from lorastack.client import Client
from lorastack.client.uploading import adapter_files
from lorastack.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError


class Publication:
    """Where a result goes: an id at a server, HOST:PORT."""

    def __init__(self, server: str, adapter_id: str, *, replace: bool) -> None:
        """replace: an id that exists gets a newer revision."""
        self._server = server
        self._id = adapter_id
        self._replace = replace

    def check(self, made: Path | None) -> str:
        """Asks the server whether it will take a result; its base's fingerprint.

        made: where the result may be already; None: it will be made anew. Raises AlreadyExistsError
        for an id that exists, unless it is to be replaced or is what was made; UnavailableError if
        there is no server.
        """
        with Client(self._server) as client:
            fingerprint = client.model_info().fingerprint
            try:
                stored = client.get_adapter(self._id)
            except NotFoundError:
                return fingerprint
        if not self._replace and (made is None or stored.digest != folder_digest(made)):
            raise AlreadyExistsError(
                f"{self._server} has an adapter {self._id!r}: --replace makes the result its "
                "newest revision, or choose another --id",
                adapter_id=self._id,
            )
        return fingerprint

    def check_base(self, theirs: str, ours: str) -> None:
        """Raises FailedPreconditionError unless both fingerprints are of one base model."""
        if theirs != ours:
            raise FailedPreconditionError(
                f"{self._server} serves another base model than is trained for: name its server by "
                "--server, or train without --upload"
            )

    def upload(self, folder: Path, progress: Callable[[int, int], None] | None) -> str:
        """Stores the folder; its digest there. progress: bytes done, bytes in all.

        A folder that is there already, from a try whose answer was lost, is not stored again.
        """
        with Client(self._server) as client:
            try:
                if client.get_adapter(self._id).digest == folder_digest(folder):
                    return folder_digest(folder)
            except NotFoundError:
                pass
            # The base model is the same by its fingerprint, whatever either side calls it.
            stored = client.upload(
                folder,
                self._id,
                if_digest=None if self._replace else "",
                accept_base=True,
                progress=progress,
            )
        return stored.digest


def folder_digest(folder: Path) -> str:
    """The digest of an adapter's folder; "" if there is none."""
    if not folder.is_dir():
        return ""
    return adapter_digest([file_spec(path) for path in adapter_files(folder)[0]])
