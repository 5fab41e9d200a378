"""Heads as a user names them: by an id of the store, or by their folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from lorastack.adapters.store.ids import NO_HEADS
from lorastack.errors import InvalidArgumentError
from lorastack.layout import ModelShapes
from lorastack.request import HeadsUse
from lorastack.train.folder import HeadsFolder, load_heads
from lorastack.train.heads import MedusaHeads
from lorastack.train.local import LocalEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedHeads:
    """use: as the engine serves them. folder: None for heads of the store. files: their bytes, by
    name. heads, ids_N: see `HeadsFolder`.
    """

    name: str
    use: HeadsUse
    folder: Path | None
    files: Mapping[str, Path]
    heads: MedusaHeads
    ids_N: Tensor | None


def named_heads(engine: LocalEngine, name: str, option: str) -> NamedHeads:
    """The heads of an existing folder, else of an id. option: which names them, for messages.

    Raises NotFoundError, and InvalidArgumentError for what holds no heads for this model.
    """
    folder = Path(name) if name and Path(name).is_dir() else None
    if folder is not None:
        use = engine.add_folder(folder).heads
    else:
        use = engine.select((), name).heads if name not in ("", NO_HEADS) else None
    if use is None:
        raise InvalidArgumentError(f"{option} {name!r}: name Medusa heads, by id or folder")
    shapes, shared = engine.model.backend.shapes, None
    if use.shared_digest:
        shared = _read(engine.files(use.shared_digest), shapes)
    files = engine.files(use.digest)
    read = _read(files, shapes, shared)
    return NamedHeads(
        name=name, use=use, folder=folder, files=files, heads=read.heads, ids_N=read.ids_N
    )


def _read(
    files: Mapping[str, Path], shapes: ModelShapes, shared: HeadsFolder | None = None
) -> HeadsFolder:
    with TemporaryDirectory() as room:  # a store keeps files by their hashes
        for name, path in files.items():
            (Path(room) / name).symlink_to(path)
        return load_heads(Path(room), shapes, shared)
