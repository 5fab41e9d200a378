"""What a GPU shows of the Triton backend that the interpreter cannot, and all else again.

Stages, each a process that may fail, hang or lose its device alone: 0 machine, 1 compile, 2 right
or wrong, 3 bits, 4 speed of kernels, 5 whole steps, 6 plain torch, 7 engine, 8 paging, 9 sanitizer.
Each leaves DIR/NUMBER.json, which grows as it goes; all findings in DIR come last as a table, also
in DIR/table.md. What is expected of a number stands beside it.

    python -m benchmarks.gpu.check --stages 0,1,2,3,4 --out DIR        (a GPU, at most 300 s)
    python -m benchmarks.gpu.check --stages 1,5,6,7,8 --out DIR        (a GPU, at most 330 s)
    TRITON_INTERPRET=1 python -m benchmarks.gpu.check --out DIR        (no GPU, at tiny sizes)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.record import ENDED, NOT_RUN, Report, table
from benchmarks.gpu.stages import STAGES, run_stage


def main(words: Sequence[str] | None = None) -> int:
    """1 if anything was not as expected. words: of the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    every = ",".join(str(stage.number) for stage in STAGES)
    parser.add_argument("--stages", default=every, help=f"numbers of them, {every} unless given")
    parser.add_argument("--out", type=Path, default=Path("build", "gpu-check"), help="a folder")
    parser.add_argument("--tiny", action="store_true", help="sizes for a first look")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="times the seconds that each stage may take"
    )
    arguments = parser.parse_args(words)
    numbers = [number.strip() for number in arguments.stages.split(",")]
    unknown = [number for number in numbers if number not in every.split(",")]
    if unknown:
        parser.error(f"--stages {arguments.stages}: no stage {unknown[0]}, there are {every}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(out / "cache"))  # one for all stages
    reports = []
    for stage in (STAGES[int(number)] for number in numbers):
        report = run_stage(stage, out, patience=arguments.patience, tiny=arguments.tiny)
        print(*report.lines(), sep="\n", flush=True)
        reports.append(report)
    found = sorted([*reports, *_earlier(out, numbers)], key=lambda report: report.number)
    text = f"{_heading(found)}\n\n{table(found)}\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    print(f"\n{text}")
    return int(any(report.state != NOT_RUN and not report.passed for report in reports))


def _earlier(out: Path, numbers: Sequence[str]) -> list[Report]:
    """What earlier runs left there of other stages than these."""
    files = [out / f"{stage.number}.json" for stage in STAGES if f"{stage.number}" not in numbers]
    return [Report.read(file) for file in files if file.exists()]


def _heading(reports: Sequence[Report]) -> str:
    devices = sorted({report.device for report in reports if report.device})
    ran = [str(report.number) for report in reports if report.state == ENDED]
    return f"Stages {', '.join(ran) or 'none'} ran to their ends on: {', '.join(devices) or '-'}."


if __name__ == "__main__":
    sys.exit(main())
