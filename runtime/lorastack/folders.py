"""Folders of adapters: which of their files are sent, and how received ones are written."""

from __future__ import annotations

import errno
import hashlib
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    Reason,
)
from lorastack.printable import printable

# What an adapter is made of: weights, configs, tokenizer files and templates, and words about it.
_KEPT = (".json", ".jinja", ".md", ".safetensors")
_PICKLES = (".pt", ".bin", ".pth")
# What trainers save beside the weights, by the start of its name; an adapter does not need it.
_TRAINER_STATE = (
    *("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"),
    "trainer_state",
)
_RESULTS = "_results.json"  # train_results.json, all_results.json
_CONFIG = "adapter_config.json"
_HEADS = "medusa_lm_head.safetensors"
_MAX_NAMED = 64  # files that were left out; the others are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The names in a folder. files: what belongs to the adapter. left_out: all else, to be named.

    Both are sorted; names of folders end in a slash.
    """

    files: tuple[str, ...]
    left_out: tuple[str, ...]


def choose(names: Iterable[str], where: str, files_in: Callable[[str], Collection[str]]) -> Choice:
    """Tells an adapter's files from what trainers, tools and systems leave beside them.

    names: a folder's, those of its own folders with a slash at their end; files_in: what one of
    those holds, so that a refusal can say which hold adapters. Raises InvalidArgumentError if no
    weights are there that may be sent.
    """
    shown = sorted(names)
    files = [name for name in shown if belongs(name)]
    left_out = [name for name in shown if not belongs(name)]
    if not any(name.endswith(".safetensors") for name in files):
        remedy = _remedy(left_out, files_in) or _has(files, left_out)
        raise InvalidArgumentError(
            f"{where} holds no *.safetensors file{remedy}", reason=Reason.INVALID_ADAPTER
        )
    return Choice(files=tuple(files), left_out=named(left_out))


def named(names: Sequence[str]) -> tuple[str, ...]:
    """The names that fit into a message."""
    shown = tuple(map(printable, names[:_MAX_NAMED]))
    return shown if len(names) <= _MAX_NAMED else (*shown, f"and {len(names) - _MAX_NAMED} more")


def adapter_files(folder: Path) -> tuple[list[Path], list[str]]:
    """What an upload of a folder sends, sorted by name, and the names of what it leaves out.

    Raises InvalidArgumentError for what is no folder of an adapter.
    """
    chosen = choose(_names(folder), str(folder), lambda name: _names(folder / name))
    paths = [folder / name for name in chosen.files]
    for path in paths:
        if not path.is_file():  # a pipe would never end
            raise InvalidArgumentError(f"{path} is not a regular file: take it out of the folder")
    return paths, list(chosen.left_out)


def folder_files(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones, sorted by name. Raises InvalidArgumentError."""
    paths = [folder / name for name in _names(folder) if not name.startswith(".")]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InvalidArgumentError(f"{folder} holds no files; name the folder of an adapter")
    return sorted(paths)


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is not a folder; name the one that holds the adapter")
    return [f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir()]


def belongs(name: str) -> bool:
    """Whether a file is part of an adapter, by its name."""
    return (
        name.endswith(_KEPT)
        and not name.startswith((".", *_TRAINER_STATE))
        and not name.endswith(_RESULTS)
    )


def is_pickled_weights(name: str) -> bool:
    """Whether a file holds an adapter's weights in a form that is never sent, by its name."""
    return name.endswith(_PICKLES) and not name.startswith((".", *_TRAINER_STATE))


def _remedy(left_out: Sequence[str], files_in: Callable[[str], Collection[str]]) -> str:
    """What to do about a folder without weights; "" if nothing in it tells."""
    pickles = [name for name in left_out if is_pickled_weights(name)]
    if pickles:
        shown = ", ".join(map(printable, pickles[:4]))
        return (
            f" but {shown}: pickles are never sent; `lorastack adapters convert DIR NEW` writes "
            "them as safetensors into a new folder, upload that"
        )
    folders = [name for name in left_out if name.endswith("/") and not name.startswith(".")]
    inner = [name.rstrip("/") for name in folders[:_MAX_NAMED] if _is_adapter(name, files_in)]
    if inner:
        shown = ", ".join(map(printable, inner[:8]))
        return f" itself, but folders that look like adapters: name one of them ({shown})"
    return ""


def _is_adapter(name: str, files_in: Callable[[str], Collection[str]]) -> bool:
    """Whether a folder in the folder is probably an adapter's."""
    try:
        return not {_CONFIG, _HEADS}.isdisjoint(files_in(name))
    except (OSError, LorastackError):
        return False


def _has(files: Sequence[str], left_out: Sequence[str]) -> str:
    shown = ", ".join(map(printable, sorted([*files, *left_out])[:8]))
    return f" (it has: {shown or 'no files'}); name the folder that holds an adapter's weights"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder that becomes `target` when the block ends; nothing stays if it raises.

    Raises FailedPreconditionError if the target is there already, unless it is an empty folder.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise _taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename.
    staged = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    staged.mkdir()
    try:
        yield staged
        staged.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # taken meanwhile
            raise _taken(target) from error
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class Receiver:
    """Writes files that arrive one after the other: `begin`, the bytes by `write`; `end` at last.

    Nothing the other side says is trusted: names must be plain and new, bytes have their sha256.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None

    def begin(self, name: str, size: int, sha256: str) -> None:
        """The next file. Raises InvalidArgumentError for its name, else what `end` raises."""
        self.end()
        path = self._folder / name
        plain = name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)
        if not plain or path.exists():
            raise InvalidArgumentError(f"the server sent a file named {name[:80]!r}: refused")
        path.touch()
        self._path, self._size, self._sha256 = path, size, sha256
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """More bytes of the file. Raises InvalidArgumentError before the first `begin`."""
        if self._path is None:
            raise InvalidArgumentError("the server sent bytes of no file: refused")
        with self._path.open("ab") as file:
            file.write(data)
        self._digest.update(data)

    def end(self) -> None:
        """Checks the last file. Raises DataLossError if it is not what was announced."""
        if self._path is None:
            return
        size = self._path.stat().st_size
        if size != self._size or self._digest.hexdigest() != self._sha256:
            raise DataLossError(
                f"{self._path.name} arrived damaged ({size} of {self._size} bytes, or other "
                "ones): try again"
            )
        self._path = None


def _taken(target: Path) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{target} exists and is not an empty folder: name another one, or empty it",
        reason=Reason.INVALID_REQUEST,
    )
