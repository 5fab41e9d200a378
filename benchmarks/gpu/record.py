"""What a stage has found: numbers beside what was expected of them, in a file that grows with it.

The file is written after every finding, so whatever ends a stage leaves what came before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

MAX_LINES = 8  # that a stage prints
WAITING, RUNNING, ENDED, FAILED = "waiting", "running", "ended", "failed"  # of a case
NOT_RUN, TIMED_OUT = "not run", "timed out"  # of a stage, beside RUNNING, ENDED and FAILED


class LeftOut(Exception):
    """Why a stage says nothing here."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A number. least, most: what was expected of it, if anything was."""

    what: str
    value: float
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def expected(self) -> str:
        """In words, "" where nothing was."""
        if self.least is not None and self.most is not None:
            return f"{_number(self.least)} to {_number(self.most)}"
        if self.least is not None:
            return f"at least {_number(self.least)}"
        if self.most is not None:
            return f"at most {_number(self.most)}" if self.most else "0"
        return ""

    @property
    def missed(self) -> bool:
        """False without an expectation. NaN misses any."""
        above = self.least is None or self.value >= self.least
        below = self.most is None or self.value <= self.most
        return not (above and below)

    def __str__(self) -> str:
        expected = f", expected {self.expected}" if self.expected else ""
        return f"{self.what}: {_number(self.value)} {self.unit}".rstrip() + expected


Cases: TypeAlias = dict[str, Callable[[], Iterator[Finding]]]  # of a stage, by name


@dataclass(slots=True)
class Case:
    """A part of a stage, which fails alone if it can."""

    state: str = WAITING
    error: str = ""
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """A stage's. device: where it ran. why: it did not run, or not to its end. notes: more to read,
    in no table."""

    number: int
    name: str
    state: str = RUNNING
    why: str = ""
    device: str = ""
    seconds: float = 0.0
    cases: dict[str, Case] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Report:
        """What a stage wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["cases"] = {
            name: Case(**{**case, "findings": [Finding(**each) for each in case["findings"]]})
            for name, case in fields["cases"].items()
        }
        return cls(**fields)

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(part, path)

    @property
    def findings(self) -> Iterator[Finding]:
        return (each for case in self.cases.values() for each in case.findings)

    @property
    def troubles(self) -> list[str]:
        """Cases that failed or found nothing, and findings that are not as expected; why the stage
        did not end."""
        troubles = [self.why] if self.state in (FAILED, TIMED_OUT) else []
        for name, case in self.cases.items():
            if case.state == FAILED:
                troubles.append(f"{name} failed: {case.error}")
            elif case.state == ENDED and not case.findings:
                troubles.append(f"{name} found nothing")
            troubles += [f"{name}: {each}" for each in case.findings if each.missed]
        return troubles

    @property
    def passed(self) -> bool:
        """Ran to its end, and all came as expected."""
        return self.state == ENDED and not self.troubles

    def lines(self) -> list[str]:
        """At most MAX_LINES."""
        count = sum(1 for _ in self.findings)
        head = f"stage {self.number}, {self.name}: "
        if self.state == NOT_RUN:
            return [head + f"not run: {self.why}"]
        troubles = self.troubles
        head += f"{count} findings, {len(troubles)} not as expected, {self.seconds:.0f} s"
        lines = [head, *(f"  {each}"[:200] for each in troubles)]
        if len(lines) > MAX_LINES:
            left = len(lines) - MAX_LINES + 1
            lines[MAX_LINES - 1 :] = [f"  and {left} more, see {self.number}.json"]
        return lines


def table(reports: Sequence[Report]) -> str:
    """All findings as Markdown."""
    rows: list[tuple[str, ...]] = [("stage", "what", "found", "expected", "")]
    for report in reports:
        rows += _rows(report)
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    stage = f"{report.number} {report.name}"
    if report.state != ENDED:
        yield (
            stage,
            report.state,
            _cell(report.why),
            "",
            "" if report.state == NOT_RUN else "FAILED",
        )
    for name, case in report.cases.items():
        for each in case.findings:
            verdict = "" if not each.expected else "MISSED" if each.missed else "as expected"
            found = f"{_number(each.value)} {each.unit}".rstrip()
            yield stage, _cell(f"{name}: {each.what}"), found, each.expected, verdict
        if case.state == FAILED:
            yield stage, name, _cell(case.error), "", "FAILED"
        elif case.state != ENDED:
            yield stage, name, "not run", "", ""
        elif not case.findings:
            yield stage, name, "nothing", "", "FAILED"


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
