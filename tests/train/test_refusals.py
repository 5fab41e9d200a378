"""What `train heads` cannot do it says before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorastack.errors import InvalidArgumentError, LorastackError, NotFoundError
from lorastack.train.distill import DistillOptions
from lorastack.train.pipeline import make_heads
from lorastack.train.start import StartOptions
from tests.train.runs import PROMPTS, heads_run

pytestmark = pytest.mark.usefixtures("cheap_steps")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompts"),
        ("\n \n", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ('{"prompt": "a"}\n\n{"other": "b"}\n', "line 3"),
    ],
)
def test_bad_prompts_are_told_before_anything_loads(
    text: str, words: str, tiny_llama: Path, tmp_path: Path, no_model: None
) -> None:
    run = heads_run(tmp_path, tiny_llama, None)
    run.prompts.write_text(text)
    with pytest.raises(InvalidArgumentError, match=words):
        make_heads(run)
    assert not run.work.exists()


def test_prompts_beyond_the_context_are_skipped_and_counted(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = heads_run(tmp_path, tiny_llama, None)
    with run.prompts.open("a") as file:
        file.write(json.dumps({"prompt": "long " * 100}) + "\n")
    outcome = make_heads(replace(run, model=replace(run.model, max_context=128)))
    assert outcome.distilled.num_skipped == 1
    assert outcome.distilled.num_samples == len(PROMPTS)
    run.prompts.write_text(json.dumps("long " * 100))
    with pytest.raises(InvalidArgumentError, match="none of its 1 prompts"):
        make_heads(replace(run, model=replace(run.model, max_context=128), restart=True))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"loras": (("nobody", 1.0),)}, NotFoundError, "nobody"),
        ({"loras": (("heads", 1.0),)}, InvalidArgumentError, "Medusa heads, not a LoRA"),
        ({"start": StartOptions(continue_from="nobody")}, NotFoundError, "nobody"),
        ({"start": StartOptions(continue_from="lora-a")}, InvalidArgumentError, "LoRA without"),
        ({"start": StartOptions(shared="none")}, InvalidArgumentError, "--from"),
        ({"bundle": True}, InvalidArgumentError, "--bundle"),
        ({"bundle": True, "loras": (("lora-a", 0.5),)}, InvalidArgumentError, "scale 1"),
        ({"bundle": True, "loras": (("both", 1.0),)}, InvalidArgumentError, "exactly one LoRA"),
        ({"draft_vocabulary": 3}, InvalidArgumentError, "draft vocabulary of 3"),
        ({"distill": DistillOptions(num_top=1000)}, InvalidArgumentError, "--soft-targets 1000"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    changes: dict[str, Any],
    error: type[LorastackError],
    words: str,
    tiny_llama: Path,
    store: Path,
    tmp_path: Path,
) -> None:
    run = heads_run(tmp_path, tiny_llama, store, **changes)
    with pytest.raises(error, match=words):
        make_heads(run)
    assert [path.name for path in run.work.iterdir()] == ["LOCK"]
    make_heads(heads_run(tmp_path, tiny_llama, None))  # and the folder is free for another try


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_id": "no id"}, "not an adapter id"),
        ({"start": StartOptions(private_rank=4)}, "--private-rank goes with --from"),
        ({"start": StartOptions(shared="a", continue_from="b")}, "exclude each other"),
        ({"start": StartOptions(shared="a", num_heads=2)}, "--num-heads"),
        ({"start": StartOptions(num_heads=33)}, "--num-heads may be 32"),
    ],
)
def test_contradictions_are_told_before_anything_loads(
    changes: dict[str, Any], words: str, tiny_llama: Path, tmp_path: Path, no_model: None
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        make_heads(heads_run(tmp_path, tiny_llama, None, **changes))
