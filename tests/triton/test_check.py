"""`benchmarks.gpu.check` stage by stage at tiny sizes, and what becomes of stages that go wrong."""

from __future__ import annotations

import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import bits, check, right, right_samples, sanitizer, stages
from benchmarks.gpu.record import (
    ENDED,
    FAILED,
    MAX_LINES,
    NOT_RUN,
    TIMED_OUT,
    Case,
    Finding,
    LeftOut,
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
@pytest.mark.parametrize("number", range(len(STAGES)))
def test_every_stage_runs_end_to_end_at_tiny_sizes(tmp_path: Path, number: int) -> None:
    report = run_stage(STAGES[number], tmp_path, patience=PATIENCE, tiny=True)
    if report.state == NOT_RUN:
        assert number == 9 and report.why and not report.passed
        return
    assert report.passed, report.lines()
    assert report.cases and all(case.findings for case in report.cases.values())
    assert all(math.isfinite(each.value) for each in report.findings)
    words = {2: "int4 weights", 3: "tokens of 12", 5: "launches", 7: "accepted", 8: "other bytes"}
    assert any(words.get(number, "") in each.what for each in report.findings)


def test_the_table_has_all_that_lies_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of earlier runs too, which are no part of this one's exit status."""
    monkeypatch.setenv("GPU_STAGE_CASES", "sound")
    earlier = Report(2, "right or wrong", state=FAILED, why="exit status 1", device="a device")
    earlier.write(tmp_path / "2.json")
    made_up = replace(STAGES[5], module=MODULE)
    monkeypatch.setattr(check, "STAGES", (*STAGES[:5], made_up, *STAGES[6:]))
    words = ["--stages", "5", "--out", str(tmp_path), "--tiny", "--patience", f"{PATIENCE}"]
    assert check.main(words) == 0
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "| 2 right or wrong | failed | exit status 1 |" in text
    assert "| 5 whole steps | sound: what was found | 3 things | at least 2 |" in text
    assert text.startswith("Stages 5 ran to their ends on: ") and "a device" in text


def test_what_is_not_run_has_neither_passed_nor_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made_up(stage: Stage, out: Path, **options: object) -> Report:
        return Report(stage.number, stage.name, state=NOT_RUN, why="needs a CUDA device")

    monkeypatch.setattr(check, "run_stage", made_up)
    assert check.main(["--stages", "9", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| 9 sanitizer | not run | needs a CUDA device |  |  |" in printed
    assert "Stages none ran" in printed


SANITIZER = """#!{python}
import json, sys
(file,) = [word for word in sys.argv if word.endswith("2.json")]
report = json.load(open(file))
report["cases"] = {{name: {{"state": name, "findings": []}} for name in {states}}}
json.dump(report, open(file, "w"))
print("========= ERROR SUMMARY: {errors} errors")
"""


@pytest.mark.parametrize(
    ("states", "errors", "missed"),
    [(["ended"], 0, []), (["ended"], 2, ["bad reads"]), ([], 0, ["kinds of kernels"]),
     (["ended", "failed"], 0, ["of them"])],
)  # fmt: skip
def test_what_the_sanitizer_says_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    states: list[str],
    errors: int,
    missed: list[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    setting = Setting(torch.device("cuda"), tiny=True)
    with pytest.raises(LeftOut, match="is not on the PATH"):
        sanitizer.cases(setting)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable, states=states, errors=errors))
    tool.chmod(0o755)
    findings = list(sanitizer.cases(setting)["memory"]())
    assert [each.what for each in findings if each.missed] == [
        each.what for each in findings if each.what.startswith(tuple(missed or ["none"]))
    ]
    assert sum(each.missed for each in findings) == len(missed)


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


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_process_that_a_driver_does_not_let_go_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(stages, "GRACE", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda pid, number: left.append(pid))
        report = run(tmp_path, patch, "hangs", 0.5)
    assert report.state == TIMED_OUT
    os.killpg(left[0], signal.SIGKILL)


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


def test_products_of_heads_that_are_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen from them may still be right."""
    setting = Setting(torch.device("cpu" if INTERPRETED else "cuda"), tiny=True)

    def wrong(r_LYH: Tensor, pairs: object, logits_YN: Tensor, tiles: int) -> None:
        logits_YN.normal_()

    monkeypatch.setattr(right_samples.heads_kernels, "logits", wrong)
    missed = [each.what for each in right.cases(setting)["heads"]() if each.missed]
    assert missed == ["bfloat16, logits", "float32, logits"]


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
    assert "999 ms" in str(Finding("time", 999.4, "ms"))
    assert "1000 ms" in str(Finding("time", 999.6, "ms"))
    assert not Finding("time", 5.0).missed and not Finding("time", 5.0).expected


def test_a_case_that_found_nothing_has_failed() -> None:
    report = Report(4, "speed of kernels", state=ENDED, cases={"matmul": Case(ENDED)})
    assert report.troubles == ["matmul found nothing"] and not report.passed
    assert "| 4 speed of kernels | matmul | nothing |  | FAILED |" in table([report])


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
