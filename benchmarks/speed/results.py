"""From rounds to a table, ratios, and the bars that this project set itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

OFF, AUTO = "off", "auto"
BANDWIDTH = "bandwidth"
MATHS, GAPS = "maths", "gaps"


@dataclass(slots=True)
class Results:
    """A list per (case, engine), one value a round: tokens a second.

    BANDWIDTH is an engine too: bytes a second, just before the case. step_bytes: what a step of a
    case must read; rows: of its batch.
    """

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    step_bytes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)

    def add(self, case: str, engine: str, value: float) -> None:
        self.values.setdefault(case, {}).setdefault(engine, []).append(value)

    def set_floor(self, case: str, rows: int, step_bytes: int) -> None:
        self.rows[case], self.step_bytes[case] = rows, step_bytes

    def median(self, case: str, engine: str) -> float | None:
        """The median of an engine's results; None if it did not run the case."""
        values = self.values.get(case, {}).get(engine)
        return statistics.median(values) if values else None

    def ratio(self, ours: tuple[str, str], other: tuple[str, str]) -> float | None:
        """Median over rounds of one (case, engine) over another."""
        pair = [self.values.get(case, {}).get(engine, []) for case, engine in (ours, other)]
        ratios = [a / b for a, b in zip(*pair, strict=False)]
        return statistics.median(ratios) if ratios else None

    def of_floor(self, case: str, engine: str) -> float | None:
        """Which share of the tokens that the round's bandwidth allows."""
        ratio = self.ratio((case, engine), (case, BANDWIDTH))
        return None if ratio is None else ratio * self.bytes_a_token(case)

    def floor(self, case: str) -> float | None:
        """Tokens a second at the median bandwidth."""
        speed = self.median(case, BANDWIDTH)
        return None if speed is None else speed / self.bytes_a_token(case)

    def bytes_a_token(self, case: str) -> float:
        return self.step_bytes[case] / self.rows[case]

    def table(self, engines: list[str]) -> list[dict[str, object]]:
        """A row a case; of floor: OFF's share."""
        rows: list[dict[str, object]] = []
        for case in self.values:
            if case == MATHS:
                continue
            row: dict[str, object] = {"tokens/s": case}
            row["floor"] = shown(self.floor(case), "{:.0f}")
            row |= {engine: shown(self.median(case, engine), "{:.1f}") for engine in engines}
            row["of floor"] = shown(self.of_floor(case, OFF), "{:.0%}")
            rows.append(row)
        return rows

    def heads_table(self) -> list[dict[str, object]]:
        """One row that answers maths questions: AUTO, its trees capped, and llama.cpp."""
        return [
            {
                "engine": engine,
                "tokens/s": shown(self.median(MATHS, engine), "{:.1f}"),
                "over off": shown(self.ratio((MATHS, engine), (MATHS, OFF)), "{:.2f}x"),
            }
            for engine in self.values.get(MATHS, {})
        ]


@dataclass(frozen=True, slots=True)
class Bar:
    """value: None where a peer is missing. at_most: the target is an upper limit."""

    name: str
    value: float | None
    target: float
    at_most: bool = False

    @property
    def row(self) -> dict[str, object]:
        reached = "not measured"
        if self.value is not None:
            good = self.value <= self.target if self.at_most else self.value >= self.target
            reached = "yes" if good else "no"
        limit = "at most" if self.at_most else "at least"
        return {
            "bar": self.name,
            "measured": shown(self.value, "{:.2f}"),
            "target": f"{limit} {self.target:g}",
            "reached": reached,
        }


def bars(r: Results, gaps: dict[str, float], backend: str) -> list[Bar]:
    """gaps: p99 and stall, over the median gap. backend: tiles (AMX) have bars of their own."""
    one, eight, many = "base, 1 rows", "base, 8 rows", "base, 32 rows"
    loras, prefill = "8 rows, 8 LoRAs", "prefill"
    tiles = "amx" in backend
    batch_peer, prefill_peer = faster(r, eight), faster(r, prefill)
    common = [
        Bar("batch 1 OFF over llama_cpp", r.ratio((one, OFF), (one, "llama_cpp")), 1.0),
        Bar("batch 1 OFF of its floor", r.of_floor(one, OFF), 0.75),
        Bar(
            f"batch 8 OFF over {batch_peer}",
            r.ratio((eight, OFF), (eight, batch_peer)),
            1.5 if tiles else 1.3,
        ),
        Bar(
            "8 LoRAs over PEFT's mixed batch",
            r.ratio((loras, OFF), (loras, "peft")),
            10.0 if tiles else 8.0,
        ),
        Bar("8 LoRAs over batch 8 without", r.ratio((loras, OFF), (eight, OFF)), 0.7),
        Bar("maths AUTO over OFF", r.ratio((MATHS, AUTO), (MATHS, OFF)), 1.4 if tiles else 1.5),
        Bar("maths AUTO over llama_cpp", r.ratio((MATHS, AUTO), (MATHS, "llama_cpp")), 1.4),
        Bar(f"prefill over {prefill_peer}", r.ratio((prefill, OFF), (prefill, prefill_peer)), 0.8),
        Bar("p99 gap over median, 8 rows", gaps.get("p99"), 1.5, at_most=True),
        Bar("longest gap during a long prompt", gaps.get("stall"), 2.0, at_most=True),
    ]
    if not tiles:
        return common
    return [
        *common,
        Bar("8 LoRAs over OpenVINO's base batch", r.ratio((loras, OFF), (eight, "openvino")), 1.0),
        Bar("8 LoRAs of their floor", r.of_floor(loras, OFF), 0.65),
        Bar("batch 32 OFF over batch 8", r.ratio((many, OFF), (eight, OFF)), 1.7),
    ]


def faster(r: Results, case: str) -> str:
    """Of llama.cpp and OpenVINO."""
    peers = ("llama_cpp", "llama_cpp_f16", "openvino")
    return max(peers, key=lambda engine: r.median(case, engine) or 0.0)


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
