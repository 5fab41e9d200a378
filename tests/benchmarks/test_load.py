"""Arithmetic of the load benchmark: requests, steady rates, bars, the plot."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from benchmarks.load.__main__ import MODES, bars, case
from benchmarks.load.chart import chart
from benchmarks.load.fixed import all_nodes, all_rows
from benchmarks.load.traffic import NO_HEADS, Reply, Text, requests, steady_rate
from benchmarks.speed.results import AUTO, MATHS, OFF, Results
from lorastack.v1 import generation_pb2 as pb


def test_only_the_time_in_which_all_rows_run_counts() -> None:
    early = [Reply(0.0, 2.0, tokens=11), Reply(2.5, 4.5, tokens=5)]  # 5 and 2 a second
    late = [Reply(1.0, 4.0, tokens=31)]  # 10 a second
    assert steady_rate([early, late]) == pytest.approx((5 + 2 * 1.5 + 30) / 3)


def test_modes_run_the_same_requests() -> None:
    text = Text("text", NO_HEADS, [f"question {number}" for number in range(9)])
    off, auto = (
        [pb.GenerateRequest.FromString(r) for slot in requests(text, mode, 3, 4, 7) for r in slot]
        for mode in MODES
    )
    assert len(off) == 12
    assert len({request.stop.max_new_tokens for request in off}) > 1
    assert {request.speculation.mode for request in off} == {pb.OFF}
    assert not any(request.speculation.HasField("max_nodes") for request in auto)
    for request in off:
        request.speculation.mode = pb.AUTO
    assert off == auto
    assert auto != [pb.GenerateRequest.FromString(r) for r in requests(text, MODES[1], 1, 12, 8)[0]]


def test_fixed_sizes_take_every_node() -> None:
    assert all_nodes([iter([0.5, 0.0]), iter([])], 1, 2) == [2, 0]
    assert all_rows([(0.0,), (1.0,)], 2) == [True, True]


def test_bars_compare_with_the_best_size_at_each_load() -> None:
    results = Results()
    measured = {1: {OFF: 10.0, AUTO: 16.0, "fixed 2": 15.0, "fixed 8": 20.0}, 64: {OFF: 10.0}}
    measured[64] |= {AUTO: 9.6, "fixed 2": 8.0}
    for rows, rates in measured.items():
        for mode, rate in rates.items():
            results.add(case(MATHS, rows), mode, rate)
    by_name = {bar.name: bar.row for bar in bars(results, [MATHS], [1, 64])}
    least = by_name["maths: AUTO over OFF, the least of all loads"]
    assert (least["measured"], least["reached"]) == ("0.96", "no")
    assert by_name["maths: AUTO over OFF, 1 rows"]["reached"] == "yes"
    assert by_name["maths: AUTO over fixed 8, 1 rows"]["measured"] == "0.80"
    assert by_name["maths: AUTO over off, 64 rows"]["measured"] == "0.96"


def test_the_plot_is_xml_with_a_line_a_text() -> None:
    svg = ET.fromstring(chart("title", [1, 2], {"a < b": [1.5, 1.0], "c": [1.0, 0.9]}, 0.97))
    lines = list(svg.iter("{http://www.w3.org/2000/svg}polyline"))
    points = [[tuple(map(float, p.split(","))) for p in e.attrib["points"].split()] for e in lines]
    (left, high), (right, level) = points[0]
    assert left < right and high < level  # y grows downwards
    assert points[1][0][1] == level
