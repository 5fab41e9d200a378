"""A server as a process, whose store outlives it, and the command line beside it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorastack.client import Client

ADDRESS = re.compile(r" on (\S+:\d+) ")


class Deployment:
    """A model served with `options` of `lorastack serve`, one process after the other.

    root: a folder for the store, the answers of `scripted` and the log. threads: of a step.
    loaded_bytes, peak_bytes: of the process's memory when it began to serve.
    """

    def __init__(self, model: Path, root: Path, threads: int, *options: str) -> None:
        self._answers = root / "answers.json"
        self._answers.write_text("{}")
        self._log = root / "server.log"
        self._options = ["serve", "--model", str(model), "--store", str(root / "store")]
        self._options += ["--port", "0", "--threads", str(threads), *options]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._process: subprocess.Popen[str] | None = None

    def start(self, *, scripted: bool) -> None:
        """Returns when it serves. scripted: heads guess what `knows` was told."""
        run = ["lorastack.cli.main"]
        if scripted:
            run = ["tests.integration.mistral_7b.scripted", str(self._answers)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *run, *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        match = ADDRESS.search(line)
        assert match is not None, (line, self._log.read_text())
        self.address = match.group(1)
        self.client = Client(self.address)
        self.loaded_bytes, self.peak_bytes = self._memory("VmRSS"), self._memory("VmHWM")

    def stop(self) -> None:
        """SIGTERM; does nothing when there is no process."""
        if self._process is None:
            return
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()
        code, self._process = self._process.returncode, None
        assert code == 0, self._log.read_text()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def knows(self, answers: Mapping[str, Sequence[int]]) -> None:
        """What requests of these ids come to."""
        staged = self._answers.with_suffix(".new")
        staged.write_text(json.dumps({name: list(ids) for name, ids in answers.items()}))
        staged.replace(self._answers)

    def _memory(self, field: str) -> int:
        """Bytes. field: VmRSS, what the process has in memory; VmHWM, the most it ever had."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
        assert match is not None
        return int(match.group(1)) * 1024

    def adapters(self, *command: str) -> dict[str, Any]:
        """`lorastack adapters COMMAND... --json` against this server."""
        run = [sys.executable, "-m", "lorastack.cli.main", "adapters", *command]
        done = subprocess.run(
            [*run, "--server", self.address, "--json"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
