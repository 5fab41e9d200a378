"""`train eval`: what heads are worth on prompts, by their ranks and as they are served."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorastack.config import MIB, AdapterConfig, ModelConfig
from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.speculation.calibration import Calibration
from lorastack.train.evaluate import EvalRun, evaluate
from tests.helpers.adapters import with_outputs, write_heads
from tests.train.conftest import FAMILIAR
from tests.train.runs import ENGINE

pytestmark = pytest.mark.usefixtures("cheap_steps")


def prompts_file(path: Path, texts: tuple[str, ...]) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, store: Path) -> EvalRun:
    """The store's heads on two files."""
    return EvalRun(
        heads=("heads",),
        prompts=(
            prompts_file(tmp_path / "familiar.jsonl", FAMILIAR),
            prompts_file(tmp_path / "strange.jsonl", ("the sun", "x", "over", "and")),
        ),
        model=ModelConfig(model=str(tiny_llama), dtype="float32", device="cpu", threads=1),
        engine=ENGINE,
        adapters=AdapterConfig(store=store, device_memory=MIB, host_memory=MIB),
        max_new_tokens=24,
    )


def served(cell: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on the clock."""
    names = ("prompts", "tokens", "tokens_a_step", "different_replies")
    return {name: cell["served"][name] for name in names}


def test_every_heads_meets_every_file(
    run: EvalRun, adapter_folders: dict[str, Path], tmp_path: Path, tiny_llama_shapes: Any
) -> None:
    random = write_heads(tmp_path / "random", tiny_llama_shapes.hidden_size, num_heads=2)
    heads = ("heads", str(random), str(adapter_folders["heads"]))
    cells = evaluate(replace(run, heads=heads))["cells"]
    assert [(cell["heads"], Path(cell["file"]).stem) for cell in cells] == [
        (name, file) for file in ("familiar", "strange") for name in heads
    ]
    by_id, guessing, by_folder = cells[:3]
    assert by_id["ranked"] == by_folder["ranked"] != guessing["ranked"]
    assert [len(c["ranked"]["top_1_to_10_by_head"]) for c in cells[:3]] == [3, 2, 3]
    assert {cell["served"]["different_replies"] for cell in cells} == {0}
    for row in by_id["ranked"]["top_1_to_10_by_head"]:
        assert len(row) == 10 and row == sorted(row)


def test_a_cell_depends_on_its_own_heads_and_file_alone(run: EvalRun) -> None:
    together = evaluate(run)["cells"]
    for index, file in enumerate(run.prompts):
        (alone,) = evaluate(replace(run, prompts=(file,)))["cells"]
        assert alone["ranked"] == together[index]["ranked"]
        assert served(alone) == served(together[index])


def test_answers_are_those_of_the_loras(run: EvalRun) -> None:
    plain = evaluate(run)["cells"][0]
    for loras in ((("lora-a", 1.0),), (("both", 1.0),)):  # an alias, which adapts lm_head as well
        evaluation = evaluate(replace(run, loras=loras))
        assert evaluation["cells"][0]["ranked"] != plain["ranked"]
        assert evaluation["cells"][0]["served"]["different_replies"] == 0
    assert [lora["id"] for lora in evaluation["loras"]]


def test_version_1_heads_are_measured_like_the_same_of_version_2(
    run: EvalRun, adapter_folders: dict[str, Path], tmp_path: Path, tiny_llama: Path
) -> None:
    from safetensors.torch import load_file

    output_VH = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]
    old = with_outputs(tmp_path / "version-1", adapter_folders["heads"], output_VH)
    one, two = evaluate(replace(run, heads=(str(old), "heads"), prompts=run.prompts[:1]))["cells"]
    assert one["ranked"]["top_1_to_10_by_head"] == two["ranked"]["top_1_to_10_by_head"]
    assert served(one) == served(two)


def test_what_was_learnt_goes_into_the_folder(
    run: EvalRun, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter_folders["heads"], tmp_path / "heads")
    before = json.loads((folder / "config.json").read_text())
    once = replace(run, heads=(str(folder),), prompts=run.prompts[:1], write_prior=True)
    evaluate(once)
    after = json.loads((folder / "config.json").read_text())
    prior = Calibration.parse(json.dumps(after.pop("acceptance")))
    assert after == before and prior.num_heads == 3
    # It is where the engine begins the next time.
    evaluate(once)
    again = json.loads((folder / "config.json").read_text())["acceptance"]
    assert again != json.loads(prior.to_json())


def test_a_prior_is_of_one_file_and_for_folders(run: EvalRun, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="give one --prompts"):
        evaluate(replace(run, write_prior=True))
    with pytest.raises(InvalidArgumentError, match="'heads' is none"):
        evaluate(replace(run, write_prior=True, prompts=run.prompts[:1]))


def test_prompts_are_spread_over_the_file(run: EvalRun, tmp_path: Path) -> None:
    file = prompts_file(tmp_path / "many.jsonl", tuple(f"prompt {n}" for n in range(25)))
    (cell,) = evaluate(replace(run, prompts=(file,), num_prompts=6, max_new_tokens=2))["cells"]
    assert cell["served"]["prompts"] == cell["ranked"]["prompts"] == 6
    tight = replace(run.model, max_context=64)
    file = prompts_file(tmp_path / "ends-long.jsonl", ("short",) * 6 + ("long " * 100,) * 3)
    few = replace(run, prompts=(file,), num_prompts=6, max_new_tokens=2, model=tight)
    (cell,) = evaluate(few)["cells"]
    assert cell["skipped"] == 2 and cell["served"]["prompts"] == 4


def test_prompts_that_do_not_fit_are_counted(run: EvalRun, tmp_path: Path) -> None:
    file = prompts_file(tmp_path / "long.jsonl", ("long " * 100, "short"))
    tight = replace(run, model=replace(run.model, max_context=64), prompts=(file,))
    (cell,) = evaluate(tight)["cells"]
    assert cell["skipped"] == 1 and cell["ranked"]["prompts"] == 1
    prompts_file(file, ("long " * 100,))
    with pytest.raises(InvalidArgumentError, match=r"no prompt can be answered; line 1"):
        evaluate(tight)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("nobody", NotFoundError, "nobody"),
        ("lora-a", InvalidArgumentError, "a LoRA without"),
        ("none", InvalidArgumentError, "name Medusa heads"),
        ("", InvalidArgumentError, "name Medusa heads"),
    ],
)
def test_heads_that_are_none(name: str, error: type[Exception], words: str, run: EvalRun) -> None:
    with pytest.raises(error, match=words):
        evaluate(replace(run, heads=(name,)))


def test_a_folder_without_heads(run: EvalRun, adapter_folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgumentError, match="name Medusa heads"):
        evaluate(replace(run, heads=(str(adapter_folders["lora-a"]),)))
