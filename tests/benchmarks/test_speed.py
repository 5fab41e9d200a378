"""Arithmetic of the speed benchmark: times of a batch, ratios, floors, bars, gaps."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import typer
from typer.testing import CliRunner

from benchmarks.peers.process import PEERS
from benchmarks.peers.protocol import About
from benchmarks.speed.__main__ import chosen, main
from benchmarks.speed.cases import PARTS, all_cases
from benchmarks.speed.chart import chart
from benchmarks.speed.engines import Reply, done
from benchmarks.speed.latency import gaps
from benchmarks.speed.results import AUTO, BANDWIDTH, MATHS, OFF, Bar, Results, bars
from lorastack.client.traffic import Outcome


def outcome(*arrivals: tuple[float, int], sent: float = 0.0) -> Outcome:
    return Outcome(sent=sent, arrivals=arrivals, steps=1)


def test_a_batch_decodes_while_all_its_rows_do() -> None:
    early, late = Reply(0.0, 1.0, 3.0, [1] * 5), Reply(0.5, 2.0, 5.0, [2] * 7)
    batch = done([early, late])
    assert batch.prompt_seconds == 2.0
    assert batch.decode_seconds == 1.0
    assert batch.decode_tokens == 4  # two of the early row's four, two of the late one's six
    assert batch.tokens == [[1] * 5, [2] * 7]


def test_gaps_know_the_long_prompt() -> None:
    rows = [outcome((0.0, 1), (5.0, 1)), outcome((1.0, 1), (2.0, 1), (3.1, 1), (6.1, 1), (7.0, 1))]
    measured = gaps(rows, outcome((6.5, 1), sent=4.0))
    assert measured.median == pytest.approx(
        1.05
    )  # of 1.0 and 1.1; row one began before row two ran
    assert measured.p99 == pytest.approx(1.1)
    assert measured.stall == pytest.approx(3.0)


def test_ratios_are_medians_of_rounds() -> None:
    results = Results()
    for speed, ours, theirs in ((100.0, 10.0, 5.0), (200.0, 20.0, 40.0), (400.0, 40.0, 10.0)):
        results.add("case", BANDWIDTH, speed)
        results.add("case", OFF, ours)
        results.add("case", "peer", theirs)
    results.set_floor("case", rows=2, step_bytes=5)
    assert results.median("case", OFF) == 20.0
    assert results.ratio(("case", OFF), ("case", "peer")) == 2.0
    assert results.ratio(("case", OFF), ("case", "absent")) is None
    assert results.floor("case") == 80.0
    assert results.of_floor("case", OFF) == 0.25


def test_a_bar_without_its_peer_is_not_reached_nor_missed() -> None:
    results = Results()
    for engine, rate in ((OFF, 10.0), ("auto 4", 16.0), (AUTO, 15.0)):
        results.add(MATHS, engine, rate)
    results.add("base, 1 rows", OFF, 8.0)
    results.add("base, 1 rows", BANDWIDTH, 270.0)
    results.set_floor("base, 1 rows", rows=1, step_bytes=27)
    measured = bars(results, {"p99": 1.2, "stall": 2.5}, "native avx2")
    reached = {bar.name: bar.row for bar in measured}
    assert reached["batch 1 OFF over llama_cpp"]["reached"] == "not measured"
    assert reached["batch 1 OFF of its floor"]["reached"] == "yes"
    assert reached["maths AUTO over OFF"]["measured"] == "1.50"
    assert reached["p99 gap over median, 8 rows"]["reached"] == "yes"
    assert reached["longest gap during a long prompt"]["reached"] == "no"
    assert Bar("x", 1.0, 1.0).row["reached"] == "yes"


def test_bars_ask_more_of_tiles_and_nothing_of_what_was_not_measured() -> None:
    plain, tiles = (bars(Results(), {}, backend) for backend in ("native avx2", "native amx"))
    assert {bar.row["reached"] for bar in [*plain, *tiles]} == {"not measured"}
    assert {bar.name for bar in plain} < {bar.name for bar in tiles}


def test_a_batch_is_compared_with_the_faster_peer() -> None:
    results = Results()
    for engine, rate in ((OFF, 60.0), ("llama_cpp", 20.0), ("openvino", 30.0)):
        results.add("base, 8 rows", engine, rate)
    reached = {bar.name: bar.value for bar in bars(results, {}, "native avx2")}
    assert reached["batch 8 OFF over openvino"] == 2.0


def test_cases_name_their_adapters() -> None:
    cases = {case.name: case for case in all_cases(["a", "b", "c"])}
    stack = cases["3 rows, stacks of 2"]
    assert stack.loras == (("a", "b"), ("b", "c"), ("c", "a"))
    assert stack.adapters == {"a", "b", "c"}
    mixed, alike = (About("peer", "f32", "all", mixed_loras) for mixed_loras in (True, False))
    assert not stack.fits(mixed)
    assert cases["3 rows, 3 LoRAs"].fits(mixed)
    assert not cases["3 rows, 3 LoRAs"].fits(alike)
    assert cases["base, 32 rows"].fits(alike)


def test_parts_are_chosen_by_name() -> None:
    assert chosen("--only", " 8, 1,maths", PARTS) == ["1", "8", "maths"]
    assert chosen("--peers", "", PEERS) == []
    assert [case.key for case in all_cases(["a"])] == list(PARTS[:-2])
    with pytest.raises(typer.BadParameter, match="--only: no 3 among 1, 2"):
        chosen("--only", "1,3", PARTS)


def test_help_lists_the_peers() -> None:
    app = typer.Typer()
    app.command()(main)
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "llama_cpp_f16" in shown.output


def test_the_chart_is_xml_with_a_bar_a_number() -> None:
    rows: list[dict[str, object]] = [
        {"tokens/s": "a < b", "floor": "100", "off": "50.0", "peer": "-"},
        {"tokens/s": "c", "floor": "-", "off": "5.0", "peer": "10.0"},
    ]
    svg = ET.fromstring(chart("title", rows, ["off", "peer"]))
    namespace = "{http://www.w3.org/2000/svg}"
    widths = [float(r.attrib["width"]) for r in svg.iter(f"{namespace}rect") if "x" in r.attrib]
    assert widths == [260.0, 260.0, 520.0]
    assert len(list(svg.iter(f"{namespace}line"))) == 1
