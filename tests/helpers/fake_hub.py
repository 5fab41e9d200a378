"""A hub on this machine: the part of the Hugging Face HTTP API that pulls and pushes use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

PATIENCE = 120.0
LARGE = (".safetensors", ".bin")  # what the hub keeps in large-file storage


@dataclass
class Repo:
    """A repository: commits by their sha, branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    private: bool = False  # readable with a token only
    gated: bool = False  # visible, but readable with a token only
    moved_to: str = ""

    def commit(self, files: Mapping[str, bytes], revision: str = "main") -> str:
        text = repr((sorted(files.items()), len(self.commits))).encode()
        sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.revisions[revision] = sha
        return sha


class FakeHub:
    """Serves until the `with` ends; `repos` by hub id. token: the one that opens everything.

    large=False keeps no file in large-file storage. cut: files end after that many bytes of their
    transfer. hold: while clear, transfers of large files wait behind their first bytes. port: 0
    takes a free one.
    """

    token = "hf_" + "s3cret" * 5

    def __init__(self, *, large: bool = True, port: int = 0) -> None:
        self.port = port
        self.repos: dict[str, Repo] = {}
        self.large = LARGE if large else ()
        self.cut: int | None = None
        self.status = 0  # not 0: what every call is answered with
        self.misreported: dict[str, int] = {}  # file name -> the size that is announced instead
        self.hold = threading.Event()
        self.hold.set()
        self.transfers: list[
            tuple[str, str]
        ] = []  # (file name, Range) of bytes that were asked for
        self.to_hub: set[str | None] = set()  # what the hub saw as Authorization
        self.to_storage: set[str | None] = set()  # what its storage saw
        self.ended_early = threading.Event()  # a reader went away in the middle

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.hold.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, hub_id: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        repo = self.repos[hub_id] = Repo(**options)
        repo.commit(files)
        return repo

    def add_folder(self, hub_id: str, folder: Path, **options: Any) -> Repo:
        return self.add(hub_id, {p.name: p.read_bytes() for p in folder.iterdir()}, **options)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.hub.status:
            self._refuse(self.hub.status, "")
        elif parts[0] == "storage":
            self.hub.to_storage.add(self.headers["Authorization"])
            self._send_file("/".join(parts[1:3]), parts[3], parts[4])
        elif parts[:2] == ["api", "models"]:
            self.hub.to_hub.add(self.headers["Authorization"])
            self._info("/".join(parts[2:4]), (parts[4:] or ["revision", "main"])[1])
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], parts[4])
        else:  # what the library asks for on its own account
            self._refuse(404, "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self.headers["Authorization"] != f"Bearer {self.hub.token}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            hub_id = f"{wanted['organization']}/{wanted['name']}"
            self.hub.repos.setdefault(hub_id, Repo(private=wanted.get("visibility") == "private"))
            self._json({"url": f"{self.hub.endpoint}/{hub_id}", "id": hub_id})
        elif parts[-2] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif parts[-2] == "commit":
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])
        elif parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        else:
            raise AssertionError(self.path)

    def _info(self, hub_id: str, revision: str) -> None:
        repo = self._repo(hub_id)
        if repo is None:
            return
        if repo.moved_to:
            hub_id, repo = repo.moved_to, self.hub.repos[repo.moved_to]
        sha = repo.revisions.get(revision, revision)
        if sha not in repo.commits:
            self._refuse(404, "RevisionNotFound")
            return
        files = [self._sibling(name, data) for name, data in repo.commits[sha].items()]
        self._json({"id": hub_id, "sha": sha, "siblings": files})

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        size = self.hub.misreported.get(name, len(data))
        sibling: dict[str, Any] = {"rfilename": name, "size": size, "blobId": "0" * 40}
        if name.endswith(self.hub.large):
            sha256 = hashlib.sha256(data).hexdigest()
            sibling["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 130}
        return sibling

    def _resolve(self, hub_id: str, revision: str, name: str) -> None:
        self.hub.to_hub.add(self.headers["Authorization"])
        repo = self._repo(hub_id)
        if repo is None:
            return
        if repo.gated and not self._authorized():
            self._refuse(403, "GatedRepo")
        elif name.endswith(self.hub.large):
            # Another host: a token must not travel there.
            self.send_response(302)
            place = f"http://localhost:{self.hub.port}/storage/{hub_id}/{revision}/{name}"
            self.send_header("Location", place)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(hub_id, revision, name)

    def _send_file(self, hub_id: str, revision: str, file: str) -> None:
        repo = self.hub.repos[hub_id]
        data = repo.commits[repo.revisions.get(revision, revision)][file]
        wanted = self.headers["Range"] or ""
        self.hub.transfers.append((file, wanted))
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", revision)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        if self.hub.cut is not None:
            body = body[: self.hub.cut]
            self.close_connection = True
        self._send_body(body, slow=file.endswith(LARGE))

    def _send_body(self, body: bytes, *, slow: bool) -> None:
        first = len(body) // 2 if slow else 0
        try:
            self.wfile.write(body[:first])
            while slow and not self.hub.hold.wait(0.01):  # a slow line that never ends by itself
                self.wfile.write(body[first : first + 1])
                first += 1
            self.wfile.write(body[first:])
        except OSError:
            self.close_connection = True
            self.hub.ended_early.set()

    def _commit(self, hub_id: str, lines: list[dict[str, Any]]) -> None:
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        sha = self.hub.repos[hub_id].commit(files)
        url = f"{self.hub.endpoint}/{hub_id}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _repo(self, hub_id: str) -> Repo | None:
        """A private repository is answered like a missing one, which is what the hub does."""
        repo = self.hub.repos.get(hub_id)
        if repo is None or (repo.private and not self._authorized()):
            self._refuse(401 if repo is None else 404, "RepoNotFound")
            return None
        return repo

    def _authorized(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.hub.token}"

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
