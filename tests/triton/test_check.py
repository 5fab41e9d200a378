"""`benchmarks.gpu.check` end to end at tiny sizes, and what becomes of stages that go wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import bits, check, right, stages
from benchmarks.gpu.record import (
    ENDED,
    FAILED,
    MAX_LINES,
    NOT_RUN,
    TIMED_OUT,
    Case,
    Finding,
    Report,
    table,
)
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.stages import STAGES, Stage, run_stage
from lorastack.kernels.triton.launch import INTERPRETED
from lorastack.kernels.triton.weight import Weight

PATIENCE = 10  # beside a busy core the interpreter takes its time
MODULE = "tests.helpers.gpu_stages"


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: str, seconds: float) -> Report:
    monkeypatch.setenv("GPU_STAGE_CASES", cases)
    return run_stage(Stage(7, "made up", MODULE, seconds), tmp_path, tiny=True)


@pytest.mark.timeout(900)
def test_it_runs_end_to_end_at_tiny_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--stages", "2,3,5,7", "--out", str(tmp_path), "--tiny", "--patience", f"{PATIENCE}"]
    status = check.main(words)
    printed = capsys.readouterr().out
    assert status == 0, printed
    text = (tmp_path / "table.md").read_text()
    assert text in printed
    for number in (2, 3, 5, 7):
        report = Report.read(tmp_path / f"{number}.json")
        assert report.passed and all(case.findings for case in report.cases.values())
    for words in (
        "matmul: bfloat16, int4 weights",
        "heads: float32",
        "whole steps: bfloat16",
        "copies",
    ):
        assert words in text
    assert "accepted" in text and "MISSED" not in text


@pytest.mark.skipif(not INTERPRETED, reason="these stages run on a device")
def test_what_needs_a_device_is_not_run_and_has_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needing = [stage for stage in STAGES if stage.needs_device]
    assert [stage.number for stage in needing] == [0, 1, 4, 6, 8, 9]
    numbers = ",".join(f"{stage.number}" for stage in needing)
    assert check.main(["--stages", numbers, "--out", str(tmp_path)]) == 0
    for stage in needing:
        report = Report.read(tmp_path / f"{stage.number}.json")
        assert report.state == NOT_RUN and not report.passed
        assert f"| {stage.number} {stage.name} | not run | needs a CUDA device" in table([report])
    assert "Stages none ran" in capsys.readouterr().out


def test_a_case_that_raises_and_one_that_kills_end_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(tmp_path, monkeypatch, "missed raises dies sound", 600)
    states = {name: case.state for name, case in report.cases.items()}
    assert states == {"missed": "ended", "raises": FAILED, "dies": FAILED, "sound": "ended"}
    assert report.cases["raises"].error == "ValueError: no such thing"
    assert report.cases["dies"].error == "SIGKILL"
    assert [len(case.findings) for case in report.cases.values()] == [1, 1, 1, 1]
    assert len(report.troubles) == 3 and not report.passed
    assert Report.read(tmp_path / "7.json") == report


def test_a_stage_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the latest in its one case, wherever it is when its time is over."""
    report = run(tmp_path, monkeypatch, "hangs", 0.5)
    assert report.state == TIMED_OUT and not report.passed
    assert "took too long" in report.lines()[1]


def test_a_stage_that_cannot_begin_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], log: int, seconds: float) -> int:
        os.write(log, b"no gcc\n")
        return 1

    monkeypatch.setattr(stages, "_run", fails)
    report = run(tmp_path, monkeypatch, "sound", 600)
    assert report.state == FAILED and report.why == "exit status 1: no gcc"


def test_one_stage_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def made_up(stage: Stage, out: Path, **options: object) -> Report:
        ran.append(stage.number)
        return Report(stage.number, stage.name, state=TIMED_OUT, why="took too long")

    monkeypatch.setattr(check, "run_stage", made_up)
    assert check.main(["--stages", "3,2", "--out", str(tmp_path)]) == 1
    assert ran == [3, 2]
    assert "| 2 right or wrong | timed out | took too long |" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(torch.device("cpu" if INTERPRETED else "cuda"), tiny=True)
    run = right.cases(setting)["embedding, SiLU, sums"]
    assert not any(each.missed for each in run())
    monkeypatch.setattr(right, "silu_mul", lambda gate_up, inner_TI, num_tokens: None)
    assert all(each.missed for each in run())


def test_bits_that_depend_on_the_bucket_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(torch.device("cpu" if INTERPRETED else "cuda"), tiny=True)

    def careless(setting: Setting, x_TI: Tensor, weight: Weight, bucket: int) -> Tensor:
        return x_TI.float().sum(1, keepdim=True) + (1e-6 if bucket == 24 else 0)

    monkeypatch.setattr(bits, "products", careless)
    assert all(each.missed for each in bits.cases(setting)["matmul"]())


def test_a_finding_says_what_was_expected() -> None:
    assert not Finding("speed", 90.0, "%", least=85).missed
    assert Finding("speed", 80.0, "%", least=85).missed
    assert Finding("error", float("nan"), most=1).missed
    assert Finding("wrong", 0, most=0).expected == "0"
    assert str(Finding("time", 5.03, "ms", 4.6, 5.4)) == "time: 5.03 ms, expected 4.6 to 5.4"
    assert not Finding("time", 5.0).missed and not Finding("time", 5.0).expected


def test_a_stage_prints_few_lines() -> None:
    report = Report(3, "bits", state=ENDED)
    report.cases["all"] = Case(
        "ended", findings=[Finding(f"row {i}", 1, most=0) for i in range(30)]
    )
    lines = report.lines()
    assert len(lines) == MAX_LINES and lines[-1] == "  and 24 more, see 3.json"


def test_the_two_runs_that_are_documented_fit_into_their_times() -> None:
    for numbers, seconds in (((0, 1, 2, 3, 4), 300), ((1, 5, 6, 7, 8), 330)):
        words = ",".join(map(str, numbers))
        assert f"--stages {words} --out DIR" in (check.__doc__ or "")
        assert sum(STAGES[number].seconds for number in numbers) <= seconds


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--stages", "2,17"])
    assert "no stage 17, there are 0,1,2" in capsys.readouterr().err
