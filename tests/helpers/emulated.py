"""The kernels of another architecture, which an emulator runs in a process of its own.

So the tests of the kernels test them like those of this machine, and compare them with these. The
process (see emulated.cpp) asks for what a call's addresses point to and sends what it wrote.
"""

from __future__ import annotations

import atexit
import ctypes
import shlex
import struct
import subprocess
from collections.abc import Callable
from typing import Any

from lorastack.kernels.native import library
from lorastack.kernels.native.isa import Isa, supported

# By their numbers in emulated.cpp.
FUNCTIONS = (
    "lorastack_supports",
    "lorastack_scratch_bytes",
    "lorastack_forward",
    "lorastack_logits",
    "lorastack_propose",
    "lorastack_best",
    "lorastack_top",
    "lorastack_sample_rows",
    "lorastack_quantise",
)
CALL, MESSAGE = struct.Struct("=10Q"), struct.Struct("=3Q")
READ, WRITE, RESULT = range(3)


class Emulated:
    """A library like this machine's that has other instruction sets too.

    What both have is the emulator's.
    """

    def __init__(self, command: str, own: Any | None) -> None:
        """command: runs the process; own: this machine's library."""
        self._own = own
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._isas = {isa for isa in Isa if self._emulate("lorastack_supports", isa)}

    def close(self) -> None:
        """End the process."""
        with self._process:
            self._process.kill()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(first: Any, *others: Any) -> Any:
            isa = first if isinstance(first, int) else first.isa
            if isa in self._isas:
                return self._emulate(name, first, *others)
            return 0 if self._own is None else getattr(self._own, name)(first, *others)

        return call

    def _emulate(self, name: str, *arguments: Any) -> int:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        numbers = [_number(each) for each in arguments]
        stdin.write(CALL.pack(FUNCTIONS.index(name), *numbers, *[0] * (9 - len(numbers))))
        while True:
            stdin.flush()
            message = stdout.read(MESSAGE.size)
            if len(message) < MESSAGE.size:
                raise RuntimeError(f"the emulated {name} ended with {self._process.wait()}")
            kind, address, size = MESSAGE.unpack(message)
            if kind == RESULT:
                return int(address)
            if kind == READ:
                stdin.write(ctypes.string_at(address, size))
            else:
                ctypes.memmove(address, stdout.read(size), size)


def install(command: str) -> None:
    """From now on the library is this one."""
    loaded = Emulated(command, library.library())
    atexit.register(loaded.close)
    vars(library)["_load"] = lambda path: (loaded, "")
    supported.cache_clear()


def _number(argument: Any) -> int:
    """Of an integer, or the address of what ctypes would pass by reference."""
    if isinstance(argument, ctypes.Structure | ctypes.Array):
        return ctypes.addressof(argument)
    return int(argument or 0)
