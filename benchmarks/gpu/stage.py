"""One stage: a process that `check` begins, and that may be lost.

python -m benchmarks.gpu.stage MODULE FILE [--tiny]
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu.record import (
    ENDED,
    FAILED,
    NOT_RUN,
    RUNNING,
    WAITING,
    Case,
    LeftOut,
    Report,
)
from benchmarks.gpu.setting import Setting

BROKEN = 3  # exit status: the device takes no more work from this process


def main() -> int:
    """Runs what FILE does not say was run. The exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("file", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    setting = Setting.here(arguments.tiny)
    report = Report.read(arguments.file)
    report.device = setting.name
    try:
        cases = import_module(arguments.module).cases(setting)
    except LeftOut as why:
        report.state, report.why = NOT_RUN, str(why)
        report.write(arguments.file)
        return 0
    for name in cases:
        report.cases.setdefault(name, Case())
    for name, run in cases.items():
        case = report.cases[name]
        if case.state != WAITING:
            continue
        case.state, began = RUNNING, time.monotonic()
        report.write(arguments.file)
        try:
            for finding in run():
                case.findings.append(finding)
                report.write(arguments.file)
            setting.wait()
        except Exception as error:
            traceback.print_exc()
            case.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        case.seconds = time.monotonic() - began
        report.notes |= setting.notes
        case.state = FAILED if case.error else ENDED
        report.write(arguments.file)
        if case.error and setting.is_broken():
            case.state = RUNNING  # in which it broke the process
            report.write(arguments.file)
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
