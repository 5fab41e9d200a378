"""Peers that take part, and a reason for each that does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import typer

from benchmarks.peers.gguf_file import write_gguf
from benchmarks.peers.process import PEERS, Peer, PeerError, peer, python_of
from benchmarks.peers.protocol import About, Done, Job, Load
from lorastack.model.fetch.default import default_model


@dataclass(slots=True)
class Peers:
    """All by their keys. about: of every one that has loaded, even if it failed later."""

    running: dict[str, Peer] = field(default_factory=dict)
    about: dict[str, About] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    as_ours: dict[str, str] = field(default_factory=dict)

    def add(self, key: str, loaded: Peer) -> None:
        self.running[key], self.about[key] = loaded, loaded.about

    def drop(self, key: str, reason: str) -> None:
        """It is asked no more; what it has measured stays."""
        self.running.pop(key, None)
        self.reasons[key] = reason
        typer.echo(f"{key} is left out: {reason}", err=True)

    def generate(self, key: str, job: Job, part: str) -> Done | None:
        """None if the peer fails, which is then left out. part: of the benchmark."""
        try:
            return self.running[key].generate(job)
        except PeerError as error:
            self.drop(key, f"{part}: {error}")
            return None

    def check(self, job: Job, ours: Sequence[Sequence[int]]) -> None:
        """Leave out a peer whose first tokens are not ours in most rows: it runs another model.

        Roundings make a row differ now and then.
        """
        for key in list(self.running):
            done = self.generate(key, job, "first tokens")
            if done is None:
                continue
            equal = sum(a == b for a, b in zip(done.tokens, ours, strict=True))
            self.as_ours[key] = f"{equal} of {len(ours)}"
            if 2 * equal < len(ours):
                self.drop(key, f"wrong output: {self.as_ours[key]} rows begin as ours")

    def table(self) -> list[dict[str, object]]:
        """A row a peer: what it ran, or why it did not."""
        return [
            line(key, self.about.get(key), self.as_ours.get(key, "-"), self.reasons.get(key, ""))
            for key in {**self.about, **self.reasons}
        ]


def line(engine: str, about: About | None, as_ours: str, left_out: str) -> dict[str, object]:
    """A row of the table of engines."""
    return {
        "engine": engine,
        "version": about.name if about else "-",
        "numbers": about.numbers if about else "-",
        "instructions": about.instructions if about else "-",
        "rows as ours": as_ours,
        "left out": left_out,
    }


@contextmanager
def loaded_peers(
    wanted: Sequence[str], loras: dict[str, Path], threads: int, scratch: Path
) -> Iterator[Peers]:
    """The peers that load, until the block ends."""
    model = default_model()
    with ExitStack() as stack:
        peers = Peers()
        for key in wanted:
            setup = PEERS[key]
            python = python_of(setup.folder)
            if python is None:
                peers.drop(key, "not installed; `make peers` does it")
                continue
            load = Load(
                model=str(model),
                gguf=gguf_file(model, scratch, setup.gguf) if setup.gguf else "",
                loras={name: str(folder) for name, folder in loras.items()},
                threads=threads,
            )
            try:
                log = scratch / f"{key}.log"
                loaded = stack.enter_context(peer(setup.folder, python, load, log))
            except PeerError as error:
                peers.drop(key, f"loading: {error}")
            else:
                peers.add(key, loaded)
        yield peers


def gguf_file(model: Path, scratch: Path, kind: str) -> str:
    path = scratch / f"{kind}.gguf"
    if not path.exists():
        write_gguf(model, path, gguf.GGMLQuantizationType[kind])
    return str(path)
