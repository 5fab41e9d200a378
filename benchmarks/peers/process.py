"""A peer as a child process, in its own environment.

Whatever goes wrong with it is a PeerError: its line in the table, and the others go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Timer
from typing import IO, Any, TypeVar

from benchmarks.peers.instructions import limits
from benchmarks.peers.protocol import About, Done, Job, Load

T = TypeVar("T", About, Done)

FOLDER = Path(__file__).parent
USUAL = ("llama_cpp", "openvino", "peft")
ANSWER_SECONDS = 300.0  # the slowest batch of the slowest peer takes a minute
STOP_SECONDS = 10
REASON_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Setup:
    """folder: of its module and its environment. gguf: the kind of file that it reads, if any."""

    folder: str
    gguf: str = ""


# llama.cpp is faster in float16 than in bfloat16 where the CPU multiplies neither.
PEERS = {
    "llama_cpp": Setup("llama_cpp", "BF16"),
    "llama_cpp_f16": Setup("llama_cpp", "F16"),
    "openvino": Setup("openvino", "F16"),
    "peft": Setup("peft"),
}


class PeerError(RuntimeError):
    """A peer cannot do its work. The message is one line."""


class Peer:
    """A loaded peer that waits for work. Idle it uses no processor."""

    def __init__(
        self, process: subprocess.Popen[str], log: Path, load: Load, patience: float
    ) -> None:
        """patience: seconds that an answer may take."""
        self._process, self._log, self._patience = process, log, patience
        self.about = self._ask(About, "load", asdict(load))

    def generate(self, job: Job) -> Done:
        """Raises PeerError if the peer ends, says nothing for too long, or answers rubbish."""
        done = self._ask(Done, "generate", asdict(job))
        if [len(row) for row in done.tokens] != [job.new_tokens] * len(job.prompts):
            raise PeerError(
                f"wrong output: {len(done.tokens)} rows of {sorted({*map(len, done.tokens)})} "
                f"tokens instead of {len(job.prompts)} of {job.new_tokens}"
            )
        decodes = done.decode_seconds > 0 and done.decode_tokens > 0
        if not done.prompt_seconds > 0 or (job.new_tokens > 1 and not decodes):
            raise PeerError("wrong output: it counts no time or no tokens")
        return done

    def _ask(self, kind: type[T], op: str, fields: dict[str, Any]) -> T:
        requests, replies = self._process.stdin, self._process.stdout
        assert requests is not None and replies is not None
        began = time.monotonic()
        watchdog = Timer(self._patience, self._process.kill)
        watchdog.start()
        try:
            print(json.dumps({"op": op, **fields}), file=requests, flush=True)
            line = replies.readline()
        except OSError:  # it has closed its end
            line = ""
        watchdog.cancel()
        if not line:
            late = time.monotonic() - began >= self._patience
            raise PeerError(f"silent for {self._patience:g} s" if late else self._last_words())
        try:
            return kind(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise PeerError(f"wrong output: {line.strip()[:80]!r}") from error

    def _last_words(self) -> str:
        """How it ended, and the last line of its log."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        code = self._process.returncode
        how = f"exit status {code}"
        if code is None:
            how = "stopped answering"
        elif code < 0:
            how = signal.Signals(-code).name
        words = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        last = next((line for line in reversed(words) if line), "")
        return (f"{how}: {last}" if last else how)[:REASON_CHARACTERS]


def python_of(folder: str) -> Path | None:
    """The interpreter of a peer's environment; None: `make peers` has not made it."""
    python = FOLDER / folder / ".venv" / "bin" / "python"
    return python if (python.parent.parent / ".installed").exists() else None


@contextmanager
def peer(
    folder: str, python: Path, load: Load, log: Path, patience: float = ANSWER_SECONDS
) -> Iterator[Peer]:
    """The peer until the block ends. log: gets its stderr. Raises PeerError if it does not load."""
    process = begin([python, "-m", f"{__package__}.{folder}"], load.threads, log)
    try:
        yield Peer(process, log, load, patience)
    finally:
        end(process)


def begin(command: list[str | Path], threads: int, log: Path) -> subprocess.Popen[str]:
    """As limited as our server is."""
    limit = limits(os.environ.get("LORASTACK_ISA", ""))
    try:
        with log.open("w") as stderr:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                cwd=FOLDER.parents[1],
                env={**limit, **os.environ, "OMP_NUM_THREADS": str(threads)},
            )
    except OSError as error:  # an environment without its interpreter
        raise PeerError(str(error)) from error


def end(process: subprocess.Popen[str]) -> None:
    """It ends when its stdin does; else it is killed."""
    pipes: tuple[IO[str] | None, ...] = (process.stdin, process.stdout)
    for pipe in pipes:
        with suppress(OSError):
            assert pipe is not None
            pipe.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
