"""Native kernels as test parameters, and what a run says of those that it tested and skipped."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import pytest
import torch

from lorastack.kernels.native.isa import Isa, supported
from lorastack.kernels.native.library import library

LACKING = "native kernels for "  # begins the reason of a test skipped for want of instructions
FLOAT32 = tuple(isa for isa in Isa if torch.float32 in isa.dtypes)  # what logits are left to
FUSING = (Isa.AVX512, Isa.AVX2, Isa.NEON)  # widen and fuse, on every machine: the same bits


class Variant(NamedTuple):
    """The kernels for one instruction set and one dtype of weights and KV."""

    isa: Isa
    dtype: torch.dtype


def here(*isas: Isa) -> list[Isa]:
    """Those of them, or of all, that run here."""
    return [isa for isa in isas or Isa if supported(isa)]


def needs(*isas: Isa) -> pytest.MarkDecorator:
    """Skips a test where one of these is missing."""
    missing = ", ".join(isa.name for isa in isas if not supported(isa))
    return pytest.mark.skipif(bool(missing), reason=LACKING + missing)


needs_native = needs(Isa.PLAIN)  # any kernels


def needs_two(*isas: Isa) -> pytest.MarkDecorator:
    """Skips a test that compares these where there are fewer than two."""
    names = ", ".join(isa.name for isa in isas)
    return pytest.mark.skipif(len(here(*isas)) < 2, reason=f"needs two of {names}")


def each_of(*isas: Isa, made: Callable[[Isa], object] = Isa) -> Sequence[object]:
    """Parameters: those of `isas` (none: of all) that run here, and one that is skipped for all the
    others together. made: the parameter's value."""
    params: list[object] = [pytest.param(made(isa), id=isa.name) for isa in here(*isas)]
    return [*params, *_skipped(isas)]


def each_variant(*isas: Isa) -> Sequence[object]:
    """The same with each dtype of every instruction set, a `Variant`."""
    params: list[object] = []
    for isa in here(*isas):
        for dtype in isa.dtypes:
            name = f"{isa.name}-{str(dtype).removeprefix('torch.')}"
            params.append(pytest.param(Variant(isa, dtype), id=name))
    return [*params, *_skipped(isas)]


def _skipped(isas: Sequence[Isa]) -> list[object]:
    missing = [isa for isa in isas or Isa if not supported(isa)]
    if not missing:
        return []
    name = "+".join(isa.name for isa in missing)
    return [pytest.param(None, id=name, marks=needs(*missing))]


def count_tested(nodeids: Iterable[str]) -> Counter[Isa]:
    """How many of these tests were of each instruction set, by their names."""
    counts: Counter[Isa] = Counter()
    for nodeid in nodeids:
        words = set(re.split(r"[\[\]-]", nodeid))
        counts.update(isa for isa in Isa if isa.name in words)
    return counts


def summary(tested: Mapping[Isa, int], reasons: Mapping[str, int]) -> list[str]:
    """A run's last lines: which native kernels were tested, then why tests were skipped.

    tested: tests that ran; reasons: tests that were skipped.
    """
    lacking = {reason for reason in reasons if reason.startswith(LACKING)}
    others = sorted(reasons.keys() - lacking)
    first = _native_line(tested, sum(reasons[reason] for reason in lacking))
    return [first, *(f"{reasons[reason]} skipped: {reason}" for reason in others)]


def _native_line(tested: Mapping[Isa, int], skipped: int) -> str:
    counts = [f"{isa.name} ({tested.get(isa, 0)} tests)" for isa in here()]
    line = f"native kernels here: {', '.join(counts) or 'none'}"
    if skipped:
        missing = ", ".join(isa.name for isa in Isa if not supported(isa))
        why = f"for want of {missing}" if library() else "as there is no native library"
        line += f"; {skipped} skipped {why}"
    return line
