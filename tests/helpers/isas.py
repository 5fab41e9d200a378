"""Instruction sets as test parameters, and what a run says of the tests that it skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from lorastack.kernels.native.library import Isa, library, supported

LACKING = "native kernels for "  # begins the reason of a test skipped for want of instructions


def needs(*isas: Isa) -> pytest.MarkDecorator:
    """Skips a test where one of these is missing."""
    missing = ", ".join(isa.name for isa in isas if not supported(isa))
    return pytest.mark.skipif(bool(missing), reason=LACKING + missing)


def each_of(*isas: Isa) -> Sequence[object]:
    """Parameters: those that run here, and one that is skipped for all the others together."""
    params: list[object] = [pytest.param(isa, id=isa.name) for isa in isas if supported(isa)]
    missing = [isa for isa in isas if not supported(isa)]
    if missing:
        name = "+".join(isa.name for isa in missing)
        params.append(pytest.param(missing[0], id=name, marks=needs(*missing)))
    return params


def skipped_lines(reasons: Mapping[str, int]) -> list[str]:
    """What a run's last lines say of skipped tests, whose reasons are counted.

    One line for all that lack instructions, with what was tested in their place, then one for each
    other reason.
    """
    lacking = {reason for reason in reasons if reason.startswith(LACKING)}
    others = sorted(reasons.keys() - lacking)
    lines = [f"{reasons[reason]} skipped: {reason}" for reason in others]
    if lacking:
        count = sum(reasons[reason] for reason in lacking)
        lines.insert(0, _lacking_line(count, [isa for isa in Isa if supported(isa)]))
    return lines


def _lacking_line(count: int, here: Sequence[Isa]) -> str:
    missing = [isa.name for isa in Isa if isa not in here]
    why = f"CPU without {', '.join(missing)}" if library() else "No native library here"
    tested = "plain torch (float32)"
    if here:
        tested = f"native {', '.join(isa.name for isa in here)} and plain torch"
    return f"{why}: {count} skipped, tests of native kernels; tested: {tested}"
