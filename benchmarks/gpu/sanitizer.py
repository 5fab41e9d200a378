"""Out-of-bounds reads and writes of the kernels, found by NVIDIA's compute-sanitizer.

Stage 2 once more, at tiny sizes, with every tensor in memory of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.record import ENDED, Cases, Finding, LeftOut, Report
from benchmarks.gpu.setting import Setting

TOOL = "compute-sanitizer"
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")


def cases(setting: Setting) -> Cases:
    if not setting.on_device:
        raise LeftOut("needs a CUDA device, and this is the interpreter")
    if shutil.which(TOOL) is None:
        raise LeftOut(f"{TOOL} is not on the PATH")
    return {"memory": partial(_memory, setting)}


def _memory(setting: Setting) -> Iterator[Finding]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "2.json")
        Report(2, "right or wrong").write(file)
        stage = [sys.executable, "-m", "benchmarks.gpu.stage", "benchmarks.gpu.right"]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            [TOOL, "--tool", "memcheck", *stage, str(file), "--tiny"],
            capture_output=True,
            text=True,
            env=environment,
        )
        found = SUMMARY.search(done.stdout)
        assert found is not None, (done.stdout + done.stderr)[-400:]
        setting.notes["memcheck"] = done.stdout.splitlines()[-40:]
        yield Finding("bad reads and writes", int(found[1]), most=0)
        cases = Report.read(file).cases.values()
        idle = sum(each.state != ENDED for each in cases)
        yield Finding("kinds of kernels", len(cases), least=1)
        yield Finding("of them, kinds that did not run to their ends", idle, most=0)
