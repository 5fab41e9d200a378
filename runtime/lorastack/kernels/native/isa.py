"""Instruction sets: what each computes in, which this machine has, and which one runs."""

from __future__ import annotations

from enum import IntEnum
from functools import cache

import torch

from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native.library import library, problem
from lorastack.printable import printable


class Isa(IntEnum):
    """Instruction sets by their numbers in abi.h, best first.

    PLAIN is what a compiler makes of C++ for any machine of this architecture.
    """

    AMX = 0
    AVX512_BF16 = 1
    AVX512 = 2
    AVX2 = 3
    NEON_BF16 = 4
    NEON = 5
    PLAIN = 6

    @property
    def label(self) -> str:
        """Its name for users, such as avx512-bf16."""
        return self.name.lower().replace("_", "-")

    @property
    def multiplies_pairs(self) -> bool:
        """It multiplies pairs of bfloat16; the others widen each number to float32 first."""
        return self in (Isa.AMX, Isa.AVX512_BF16, Isa.NEON_BF16)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of weights, KV, LoRAs and heads."""
        return (torch.bfloat16,) if self.multiplies_pairs else (torch.bfloat16, torch.float32)


@cache
def supported(isa: Isa) -> bool:
    """True if the library is there and this machine runs its kernels for `isa`."""
    loaded = library()
    return loaded is not None and loaded.lorastack_supports(isa) == 1


def usable(dtype: torch.dtype, at_most: Isa | None = None) -> list[Isa]:
    """What this machine has for a dtype, best first. at_most: nothing better than it."""
    allowed = [isa for isa in Isa if at_most is None or isa >= at_most]
    return [isa for isa in allowed if dtype in isa.dtypes and supported(isa)]


def isa_of(dtype: torch.dtype, at_most: Isa | None = None) -> Isa | None:
    """The best that `usable` gives, None where there is none."""
    return next(iter(usable(dtype, at_most)), None)


def isa_named(label: str | None) -> Isa | None:
    """What `--isa` means, None if it is left out. Raises InvalidArgumentError if it is not here."""
    if label is None:
        return None
    here = {isa.label: isa for isa in usable(torch.bfloat16)}  # which all of them have
    if label not in here:
        has = f"this machine has {', '.join(here)}" if here else problem()
        raise InvalidArgumentError(f"--isa {printable(label)}: {has}; or leave --isa out")
    return here[label]


def missing(dtype: torch.dtype) -> str:
    """Why this machine has nothing for a dtype, with the remedy; "" if it has."""
    if usable(dtype):
        return ""
    return problem() or f"there are no native kernels for {str(dtype).removeprefix('torch.')}"
