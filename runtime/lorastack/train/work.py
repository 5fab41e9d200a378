"""The work folder of a training run: everything that the run needs to go on where it was ended.

run.json               the options that decide what comes out
LOCK                   held by the one process that works here
corpus                 what distilling made (`train.corpus`)
training.safetensors   the training's checkpoint (`train.checkpoint`)
heads                  what was learnt, as it is measured
served.json            what the engine measured
adapter                the result
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from lorastack.adapters.store.durable import TEMPORARY, replace_file
from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason

RECORD = "run.json"
LOCK = "LOCK"
CORPUS, CHECKPOINT, HEADS = "corpus", "training.safetensors", "heads"
SERVED, ADAPTER = "served.json", "adapter"
STAGES = (CORPUS, CHECKPOINT, HEADS, SERVED, ADAPTER)


class WorkFolder:
    """One run's folder, locked until `close` or the end of the process."""

    def __init__(self, root: Path) -> None:
        """Opens or makes the folder.

        Raises InvalidArgumentError for a folder that holds something else, FailedPreconditionError
        if another process works here.
        """
        self.root = root
        _refuse_foreign(root)
        root.mkdir(parents=True, exist_ok=True)
        self.close = weakref.finalize(self, os.close, _lock(root))

    def claim(
        self, options: Mapping[str, object], *, restart: bool, answers: Collection[str]
    ) -> None:
        """Begins a run, or goes on with the one that is here.

        options: names as a user writes them -> JSON values. Those of the run that is here must be
        the same, unless `restart` throws away what it left. answers: the options that decide the
        corpus; a restart with the same ones keeps it. Raises InvalidArgumentError naming those that
        differ.
        """
        wanted: dict[str, object] = json.loads(json.dumps(options))
        if restart:
            self._clear(keep=(CORPUS, RECORD) if self._agrees(wanted, answers) else ())
        elif (earlier := self._earlier()) is not None:
            if changed := _changes(earlier, wanted):
                raise InvalidArgumentError(
                    f"{self.root} holds a run with other options ({'; '.join(changed)}): give "
                    "those of the first run to go on with it, --restart to begin anew, or another "
                    "--work"
                )
            return
        replace_file(self.root / RECORD, (json.dumps(wanted, indent=2) + "\n").encode())

    def _agrees(self, wanted: Mapping[str, object], names: Collection[str]) -> bool:
        """True if the run that is here has these options as wanted."""
        with suppress(InvalidArgumentError):
            earlier = self._earlier()
            return earlier is not None and all(earlier.get(n) == wanted.get(n) for n in names)
        return False

    def _earlier(self) -> dict[str, object] | None:
        """The options of the run that is here; None if there is none."""
        path = self.root / RECORD
        try:
            options = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            options = None
        if not isinstance(options, dict):
            raise InvalidArgumentError(f"{path} is damaged: --restart throws the run away")
        return options

    def _clear(self, keep: Collection[str]) -> None:
        """Removes what runs leave, their record last: a kill meanwhile leaves a work folder."""
        for name in (*STAGES, RECORD):
            if name in keep:
                continue
            path = self.root / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _refuse_foreign(root: Path) -> None:
    """Raises unless the folder is new, empty, or was made by a run: `_clear` empties it."""
    try:
        names = {path.name for path in root.iterdir()}
    except (FileNotFoundError, NotADirectoryError) as error:
        if isinstance(error, FileNotFoundError) and not root.is_symlink():
            return
        raise InvalidArgumentError(f"--work {root} is no folder: choose another one") from None
    if RECORD not in names and names - {LOCK, RECORD + TEMPORARY}:
        raise InvalidArgumentError(
            f"--work {root} holds something else than a training run ({sorted(names)[0]}): choose "
            "a new or empty folder"
        )


def _lock(root: Path) -> int:
    """The descriptor that holds the lock until it is closed."""
    handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise FailedPreconditionError(
            f"another process trains in {root}: wait for it, or choose another --work",
            reason=Reason.STORE_IN_USE,
        ) from error
    return handle


def _changes(earlier: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    names = [*wanted, *(name for name in earlier if name not in wanted)]
    return [
        f"{name} was {_shown(earlier.get(name))} and is {_shown(wanted.get(name))}"
        for name in names
        if earlier.get(name) != wanted.get(name)
    ]


def _shown(value: object) -> str:
    if value is None or value in ([], ""):
        return "not given"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
