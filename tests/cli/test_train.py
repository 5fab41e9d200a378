"""`lorastack train`: what it shows, what it prints, and how it ends."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorastack.cli import output, trained
from lorastack.cli.choices import Backend, Device, DType
from lorastack.cli.machine import machine
from lorastack.config import GIB, MIB, EngineConfig
from lorastack.service.watch import logs
from lorastack.train.run import HeadsRun
from tests.cli.conftest import Run
from tests.helpers.costs import cheap_drafts
from tests.train.runs import write_prompts


def test_stages_have_bars_one_at_a_time(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        *(("TTY_COMPATIBLE", "1"), ("TTY_INTERACTIVE", "1")),
        *(("COLUMNS", "120"), ("NO_COLOR", "1")),
    ):
        monkeypatch.setenv(name, value)
    with output.stage_bars() as update:
        update("distilling", 3, 9, "70 tokens")
        update("training", 1, 8, "loss 2.5")  # the other stage ended early
        first = capfd.readouterr().err
        update("training", 8, 8)
        rest = capfd.readouterr().err
    assert "distilling" in first and "3/9" in first and "70 tokens" in first and "1/8" in first
    assert "8/8" in rest and "distilling" not in rest
    assert (first + rest).count("\x1b[?25l") == (first + rest).count("\x1b[?25h") == 2


def test_the_log_says_how_long_a_stage_will_take(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        update = output.stage_log()
        for done in range(100, 201, 10):  # what an earlier run did took this one no time
            update("distilling", done, 200, f"{done} tokens")
            now += 10
        update("training", 1, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "distilling: 120 of 200, 1:20 left, 120 tokens",
        "distilling: 140 of 200, 1:00 left, 140 tokens",
        "distilling: 160 of 200, 0:40 left, 160 tokens",
        "distilling: 180 of 200, 0:20 left, 180 tokens",
        "distilling: 200 of 200, 200 tokens",
        "training: 1 of 1",
    ]


@pytest.fixture
def tiny(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, ...]]:
    """Options of a small run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(logs, "configure_logging", lambda log_format, level: None)
    write_prompts(tmp_path / "prompts.jsonl")
    with cheap_drafts():
        yield (
            *("--prompts", "prompts.jsonl", "--model", str(tiny_llama), "--max-new-tokens", "8"),
            *("--dtype", "float32", "--threads", "1", "--kv-memory", "16MiB"),
        )


def test_a_run_and_an_evaluation_print_what_came_out(run: Run, tiny: tuple[str, ...]) -> None:
    training = ("--id", "mine", "--epochs", "1", "--num-heads", "2", "--held-out", "0.3")
    done = run("train", "heads", *tiny, *training)
    assert done.code == 0, done.err
    folder = Path("lorastack-train/mine/adapter")
    assert f"is in {folder}" in done.out
    assert f"lorastack adapters upload {folder} --id mine" in done.out
    assert re.search(r"^head 2 +0\.\d{3}", done.out, re.MULTILINE)
    spaced = run("train", "heads", *tiny, *training, "--work", "a work folder", "--held-out", "0")
    assert "lorastack adapters upload 'a work folder/adapter' --id mine" in spaced.out
    told = json.loads(run("train", "heads", *tiny, *training, "--json").out)
    assert told["digest"] in done.out and told["folder"] == str(folder)
    assert told["prompts"] == 11 and told["skipped"] == 0 and told["uploaded_to"] is None
    # The card shows the command without what changes nothing of the result.
    command = told["evaluation"]["training"]["command"]
    assert "--max-new-tokens 8" in command and "--threads" not in command
    evaluation = ("train", "eval", "--heads", str(folder), "--num-prompts", "2", *tiny)
    shown = run(*evaluation)
    assert shown.code == 0, shown.err
    assert re.search(rf"^{folder} +\d\.\d\d \d\.\d\dx$", shown.out, re.MULTILINE)
    (cell,) = json.loads(run(*evaluation, "--json").out)["cells"]
    assert cell["heads"] == str(folder) and cell["served"]["prompts"] == 2


def test_an_interruption_says_how_to_go_on(
    run: Run, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trained, "make_heads", interrupted)
    done = run("train", "heads", *tiny, "--id", "a/b", "--work", "here")
    assert done.code == 130
    assert done.err == "interrupted: the same command goes on with what is in here\n"
    done = run("train", "heads", *tiny, "--id", "a/b", "--restart")
    told = "interrupted: the same command without --restart goes on with what is in"
    assert done.err == f"{told} lorastack-train/a%2Fb\n"  # never inside the work folder of a


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ((), 1e-3),
        (("--from", "{folder}"), 1e-2),
        (("--continue-from", "{folder}"), 1e-3),
        (("--from", "{folder}", "--learning-rate", "0.5"), 0.5),
    ],
)
def test_a_private_part_has_its_own_learning_rate(
    options: tuple[str, ...],
    rate: float,
    run: Run,
    tiny: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[HeadsRun] = []

    def taken(asked: HeadsRun, **_: Any) -> None:
        seen.append(asked)
        raise KeyboardInterrupt

    monkeypatch.setattr(trained, "make_heads", taken)
    named = [option.format(folder=tmp_path) for option in options]
    run("train", "heads", *tiny, "--id", "x", *named)
    assert [asked.training.learning_rate for asked in seen] == [rate]


def test_adapters_need_a_store(run: Run, tiny: tuple[str, ...], tmp_path: Path) -> None:
    for command in (
        ("heads", "--id", "x", "--lora", "a"),
        ("heads", "--id", "x", "--from", "a"),
        ("eval", "--heads", "a"),
    ):
        done = run("train", *command, *tiny)
        assert done.code == 1 and done.err.count("\n") == 1
        assert f"no store at {tmp_path / 'data/lorastack/store'}: name by --store" in done.err
    assert not (tmp_path / "lorastack-train").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "nan"), "--temperature"),
        (("--learning-rate", "0"), "above 0"),
        (("--held-out", "0.6"), "--held-out"),
        (("--lora", "a:b:c"), "ID:SCALE"),
        (("--replace",), "goes with --upload"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...], words: str, run: Run, tiny: tuple[str, ...]
) -> None:
    done = run("train", "heads", *tiny, "--id", "x", *options)
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1


def test_a_lora_and_heads_from_one_command(run: Run, tiny: tuple[str, ...]) -> None:
    words = ("--rank", "2", "--epochs", "1", "--held-out", "0.3")
    done = run("train", "joint", *tiny, "--id", "quick", *words, "--heads-weight", "0.5")
    assert done.code == 0, done.err
    assert "the LoRA's distance from the base: " in done.out and "nats a token" in done.out
    (folder,) = re.findall(r" is in (\S+)", done.out)
    card = Path(folder, "README.md").read_text()
    assert "lorastack train joint " in card and "--heads-weight 0.5" in card
    assert Path(folder, "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "words",
    [
        *(("--rank", "0"), ("--heads-weight", "-1"), ("--lora-learning-rate", "0")),
        *(("--lora", "a"), ("--quantize", "int8")),
    ],
)
def test_what_joint_training_refuses(
    words: tuple[str, ...], run: Run, tiny: tuple[str, ...]
) -> None:
    done = run("train", "joint", *tiny, "--id", "quick", *words)
    assert done.code == 2 and words[0] in done.err


def test_keys_and_values_take_less_than_a_servers(run: Run, tmp_path: Path) -> None:
    found = machine(
        **dict.fromkeys(("model", "base_names", "isa", "quantize", "threads", "kv_memory")),
        **{"max_rows": None, "max_context": None, "store": tmp_path, "needs_store": False},
        **{"device": Device.CPU, "dtype": DType.AUTO, "backend": Backend.AUTO},
    )
    assert found.engine.kv_memory is None  # or what is left
    assert found.engine.most_kv < EngineConfig().most_kv
    assert f"{found.engine.most_kv // MIB}MiB, or what" in run("train", "heads", "--help").out
    assert f"{EngineConfig().most_kv // GIB}GiB, or what" in run("serve", "--help").out
