"""What interrupts `train heads` costs nothing that is done, and what is done is not done again."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from lorastack.errors import InvalidArgumentError
from lorastack.request import SamplingParams
from lorastack.train import pipeline, result
from lorastack.train.distill import DistillOptions
from lorastack.train.options import TrainOptions
from lorastack.train.pipeline import make_heads
from lorastack.train.run import HeadsRun
from lorastack.train.start import StartOptions
from tests.helpers.costs import cheap_drafts
from tests.helpers.process import FORKS
from tests.train.runs import contents, heads_run, made

LORA = (("lora-a", 1.0),)
pytestmark = pytest.mark.usefixtures("cheap_steps")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, store: Path) -> Path:
    """The folder that a run makes without interruption."""
    return made(tmp_path_factory.mktemp("plain"), tiny_llama, store, loras=LORA).folder


@pytest.mark.parametrize("stage", ["distilling", "training", "measuring", "writing"])
def test_a_run_that_was_killed_goes_on(
    stage: str, tiny_llama: Path, store: Path, tmp_path: Path, plain: Path
) -> None:
    run = heads_run(tmp_path, tiny_llama, store, loras=LORA)
    process = FORKS.Process(target=_run_and_die, args=(run, stage))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (run.work / "adapter").exists()
    assert contents(make_heads(run).folder) == contents(plain)


def _run_and_die(run: HeadsRun, stage: str) -> None:
    """Kills its own process in the middle of a stage."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(now: str, done: int, total: int, note: str = "") -> None:
        if now == stage and done >= total // 6:  # trained: behind the first checkpoint
            die()

    with (
        cheap_drafts(),
        patch.object(result, "evaluation", die if stage == "writing" else result.evaluation),
    ):
        make_heads(run, progress=progress)


def test_a_full_disk_costs_nothing_that_is_done(
    tiny_llama: Path, store: Path, tmp_path: Path, plain: Path
) -> None:
    run = heads_run(tmp_path, tiny_llama, store, loras=LORA)
    for kib in (1, 48, 100):  # of the largest file: LoRA, states and checkpoint take more
        ours, theirs = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=_run_with_a_quota, args=(run, kib * 1024, theirs))
        process.start()
        theirs.close()
        with ours:
            kind, message = ours.recv()
        assert kind == "ResourceExhaustedError" and "free some space" in message, message
        process.join()
    assert contents(make_heads(run).folder) == contents(plain)


def _run_with_a_quota(run: HeadsRun, max_file_bytes: int, told: Any) -> None:
    """Tells what it fails with: the error's class and message."""
    with cheap_drafts():
        begin = pipeline.WorkFolder

        def limited(root: Path) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
            return begin(root)

        with patch.object(pipeline, "WorkFolder", limited):
            try:
                make_heads(run)
            except Exception as error:
                told.send((type(error).__name__, str(error)))
            else:
                told.send(("nothing", ""))


def test_what_is_finished_is_not_done_again(tiny_llama: Path, tmp_path: Path) -> None:
    run = heads_run(tmp_path, tiny_llama, None)
    first = make_heads(run)
    before = {path: path.stat().st_mtime_ns for path in run.work.rglob("*") if path.is_file()}
    again = make_heads(run)
    assert again.digest == first.digest and again.served == first.served
    after = {path: path.stat().st_mtime_ns for path in run.work.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.suffix != ".bin"} == {
        p: t for p, t in before.items() if p.suffix != ".bin"
    }


CHANGES: dict[str, dict[str, Any]] = {
    "--temperature": {
        "distill": DistillOptions(max_new_tokens=24, sampling=SamplingParams(temperature=0.7))
    },
    "--max-new-tokens": {"distill": DistillOptions(max_new_tokens=12)},
    "--epochs": {"training": TrainOptions(epochs=3, batch_size=32, learning_rate=1e-2)},
    "--num-heads": {"start": StartOptions(num_heads=3)},
    "--draft-vocabulary": {"draft_vocabulary": 64},
    "--lora": {"loras": (("lora-a", 1.0),)},
    "--id": {"adapter_id": "another"},
}


def test_other_options_are_refused_by_name_or_start_over(
    tiny_llama: Path, store: Path, tmp_path: Path
) -> None:
    run = heads_run(tmp_path, tiny_llama, store)
    make_heads(run)
    for name, changes in CHANGES.items():
        with pytest.raises(InvalidArgumentError, match=f"{name} was.*--restart"):
            make_heads(replace(run, **changes))
    run.prompts.write_text('"another prompt"\n"and one more"\n')
    with pytest.raises(InvalidArgumentError, match="--prompts was sha256"):
        make_heads(run)
    make_heads(replace(run, restart=True))
    mark = run.work / "corpus" / "mark"
    mark.touch()
    changed = replace(run, start=StartOptions(num_heads=3), restart=True)
    assert make_heads(changed).evaluation["num_heads"] == 3
    assert mark.exists()  # the answers stayed
    make_heads(replace(changed, **CHANGES["--max-new-tokens"]))
    assert not mark.exists()


def test_another_tokenizer_is_refused_or_starts_over(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    run = heads_run(tmp_path / "run", model, None)
    make_heads(run)
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": "none"}))
    with pytest.raises(InvalidArgumentError, match=r"the tokenizer was.*--restart"):
        make_heads(run)
    make_heads(replace(run, restart=True))
