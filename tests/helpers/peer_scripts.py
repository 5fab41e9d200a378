"""Peers for tests: scripts that take the place of an environment's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

# What the protocol asks of an engine; a test's own lines come before and after it.
ENGINE = """
import os, sys, time
from benchmarks.peers.protocol import About, Done, serve

class Engine:
    def __init__(self, load):
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
        self.about = About(f"peer with {load.threads} threads", "float32", isa, mixed_loras=True)
        print("a library's words")  # not part of the reply
        loaded()
    def generate(self, job):
        return generated(job)

def loaded():
    pass

def generated(job):
    return Done(1.0, 2.0, 3, [[row[0]] * job.new_tokens for row in job.prompts])

"""


def write(script: Path, lines: str = "") -> Path:
    """A peer that answers each prompt with its first token, changed by `lines`."""
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!{sys.executable}\n{ENGINE}\n{lines}\nserve(Engine)\n")
    script.chmod(0o755)
    return script


def install(folder: Path, key: str, lines: str = "") -> None:
    """The same where `make peers` would have put it."""
    environment = folder / key / ".venv"
    write(environment / "bin" / "python", lines)
    (environment / ".installed").touch()
