"""The stages, and the process that each of them is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.record import (
    ENDED,
    FAILED,
    NOT_RUN,
    RUNNING,
    TIMED_OUT,
    WAITING,
    Report,
)

ROOT = Path(__file__).parents[2]
GRACE = 10.0  # seconds that a process gets to be gone


@dataclass(frozen=True, slots=True)
class Stage:
    """module: its `cases(setting)` gives, by name, functions that yield findings, or raises
    `LeftOut`. seconds: the most that it may take."""

    number: int
    name: str
    module: str
    seconds: float


STAGES = tuple(
    Stage(number, name, f"benchmarks.gpu.{module}", seconds)
    for number, (name, module, seconds) in enumerate(
        (
            ("machine", "machine", 15),
            ("compile", "compiling", 110),
            ("right or wrong", "right", 40),
            ("bits", "bits", 60),
            ("speed of kernels", "kernel_speed", 70),
            ("whole steps", "steps", 60),
            ("plain torch", "plain_torch", 45),
            ("engine", "serving", 70),
            ("paging", "paging", 40),
            ("sanitizer", "sanitizer", 120),
        )
    )
)


def run_stage(stage: Stage, out: Path, *, patience: float = 1.0, tiny: bool = False) -> Report:
    """Runs it in its own process, which is ended when its time is over.

    A process that dies, of an error that breaks the device for instance, is begun again for the
    cases that are left. Leaves out/NUMBER.json and what the process printed in out/NUMBER.log.
    """
    path = out / f"{stage.number}.json"
    report = Report(stage.number, stage.name)
    report.write(path)
    began = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.stage", stage.module, str(path)]
    command += ["--tiny"] if tiny else []
    with (out / f"{stage.number}.log").open("w") as log:
        again = True
        while again:
            left = began + patience * stage.seconds - time.monotonic()
            ended = _run(command, log.fileno(), left)
            report = Report.read(path)
            again = _close(report, ended, _last_line(Path(log.name)))
            report.seconds = time.monotonic() - began
            report.write(path)
    return report


def _run(command: list[str], log: int, seconds: float) -> int | None:
    """The exit status, None if it took too long. Whatever it began ends with it."""
    paths = os.pathsep.join([str(ROOT / "runtime"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # a driver that hangs lets nothing go
            process.wait(GRACE)


def _close(report: Report, status: int | None, last_line: str) -> bool:
    """Says in the report how the process ended; True if it is to be begun again."""
    running = [case for case in report.cases.values() if case.state == RUNNING]
    how = f"exit status {status}: {last_line}"
    if status is None:
        how = "took too long"
    elif status < 0:
        how = signal.Signals(-status).name
    for case in running:
        case.state, case.error = FAILED, case.error or how
    waiting = any(case.state == WAITING for case in report.cases.values())
    if report.state == NOT_RUN:
        return False
    report.state = ENDED
    if status is None:
        report.state, report.why = TIMED_OUT, "took too long"
    elif status != 0 and not (report.cases and running):
        report.state, report.why = FAILED, how
    elif waiting:
        report.state = RUNNING
    return report.state == RUNNING


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""
