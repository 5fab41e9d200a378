"""`lorastack train joint`: a LoRA and heads that learn together, on the tiny model."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorastack.config import MIB, AdapterConfig, EngineConfig
from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.train import joint, loop
from lorastack.train.corpus import NO_TARGET, Corpus
from lorastack.train.heads import identity_heads
from lorastack.train.joint_options import JointOptions
from lorastack.train.lora import LoraModel
from lorastack.train.loss import drift_loss
from lorastack.train.options import TrainOptions
from lorastack.train.pipeline import make_heads
from lorastack.train.publish import Publication
from lorastack.train.run import HeadsRun
from lorastack.train.start import StartOptions
from lorastack.train.vocabulary import output_of
from tests.helpers.costs import cheap_drafts
from tests.helpers.live import LiveServer, ask
from tests.helpers.process import FORKS
from tests.train.runs import PROMPTS, contents, heads_run

LORA_FILES = {"adapter_config.json", "adapter_model.safetensors"}
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("cheap_steps")


def joint_run(root: Path, model: Path) -> HeadsRun:
    """The tiny model's answers have no pattern: the LoRA may go far, and heads learn these."""
    run = heads_run(root, model, None)
    training = replace(run.training, epochs=6)
    options = JointOptions(rank=4, learning_rate=3e-3, heads_weight=0.1)
    return replace(run, training=training, joint=options)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> HeadsRun:
    """A run that has ended, without interruption."""
    run = joint_run(tmp_path_factory.mktemp("plain"), tiny_llama)
    make_heads(run)
    return run


@pytest.fixture(scope="module")
def folder(plain: HeadsRun) -> Path:
    return plain.work / "adapter"


def test_both_sides_learn(folder: Path) -> None:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    history = evaluation["training"]["history"]
    start, best = history[0], history[evaluation["training"]["best_epoch"]]
    assert start["held_drift"] == pytest.approx(0.0, abs=1e-4) and start["held_same"] == 1.0
    assert best["number"] > 0 and best["objective"] < start["objective"]
    assert sum(best["held_loss_K"]) < sum(start["held_loss_K"])
    # What the LoRA gave for it is little of what the heads gained, and is reported.
    gained = 0.1 * (sum(start["held_loss_K"]) - sum(best["held_loss_K"]))
    drift = evaluation["joint"]["drift"]
    assert 0 < drift["kl"] < gained and 0.5 < drift["same"] <= 1
    assert evaluation["joint"]["options"]["rank"] == 4
    card = (folder / "README.md").read_text()
    assert f"{drift['kl']:.4f} nats a token" in card and "of rank 4 on all linear layers" in card


def test_the_distance_is_what_holds_the_lora(
    plain: HeadsRun, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the divergence's gradient the same LoRA goes further from the base."""

    def untold(x_PH: torch.Tensor, *rest: torch.Tensor) -> Any:
        total, gradient_PH, same = drift_loss(x_PH, *rest)
        return total, torch.zeros_like(gradient_PH), same

    monkeypatch.setattr(joint, "drift_loss", untold)
    free = make_heads(joint_run(tmp_path, Path(str(plain.model.model)))).evaluation["training"]
    held = json.loads((folder / "evaluation.json").read_text())["training"]
    assert free["history"][-1]["train_drift"] > 2 * held["history"][-1]["train_drift"]


def test_the_bundle_is_served(
    tiny_llama: Path, plain: HeadsRun, folder: Path, tmp_path: Path
) -> None:
    adapters = AdapterConfig(store=tmp_path / "store")
    engine = EngineConfig(kv_memory=16 * MIB, max_rows=8, max_nodes=6)
    with LiveServer(tiny_llama, engine=engine, adapters=adapters) as server:
        run = replace(plain, adapter_id="made")
        make_heads(run, publication=Publication(server.server.address, "made", replace=False))
        accepted = 0
        for prompt in PROMPTS:
            on, off = (
                server.client.generate(
                    ask(prompt, stack=[("made", 1.0)], heads="", max_new_tokens=24, off=off)
                )
                for off in (False, True)
            )
            assert on.token_ids == off.token_ids
            assert on.adapters.medusa_id == "made"
            accepted += sum(on.speculation.accepted_by_head)
        assert accepted > 0


def test_peft_reads_the_lora_and_lm_head_is_the_bases(
    tiny_llama: Path, plain: HeadsRun, folder: Path
) -> None:
    """What was measured is what PEFT makes of the folder."""
    names = load_file(folder / "adapter_model.safetensors")
    assert len(names) == 2 * 7 * 2 and not any("lm_head" in n or "embed" in n for n in names)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder)
    corpus = Corpus.open(plain.work / "corpus")
    _, held = corpus.split(plain.training.held_out)
    lost = count = 0.0
    for sample in held:
        prompt_T, answer_T = corpus.prompt(sample), corpus.answers(sample)
        ids = torch.cat([prompt_T, answer_T])[None]
        with torch.no_grad():
            own = model(ids).logits[0, len(prompt_T) - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                base = model(ids).logits[0, len(prompt_T) - 1 : -1].log_softmax(-1)
        lost += float((base.exp() * (base - own)).sum())
        count += len(answer_T)
    reported = json.loads((folder / "evaluation.json").read_text())["joint"]["drift"]["kl"]
    assert lost / count == pytest.approx(reported, abs=2e-4)


def test_a_step_has_the_gradients_of_its_loss(tiny_llama: Path, plain: HeadsRun) -> None:
    """Against autograd, through all logits at once."""
    corpus = Corpus.open(plain.work / "corpus")
    lora = LoraModel(tiny_llama, rank=2, seed=0, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in lora.learnt().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    lm_head_VH = base.lm_head.weight.detach()
    ids_N = torch.arange(0, len(lm_head_VH), 2)
    output = output_of(lm_head_VH, ids_N, device=CPU, dtype=torch.float32)
    whole = output_of(lm_head_VH, None, device=CPU, dtype=torch.float32)
    options = TrainOptions(epochs=1, batch_size=10**6, held_out=0.0)
    weights = JointOptions(heads_weight=0.3)
    run = joint._Run(
        identity_heads(2, 1, 64), lora, corpus, output, whole.rows_NH, options, weights, None
    )
    sample, num_positions = 1, 100
    run._learn(sample, 0.3, num_positions)
    found = {name: tensor.grad for name, tensor in lora.learnt().items()}

    positions_P = corpus.positions([sample])
    targets_PK = corpus.targets(positions_P, 2)
    x_PH = run._states(sample)
    own = (x_PH @ lm_head_VH.T).log_softmax(-1)
    wanted = (corpus.hidden(positions_P) @ lm_head_VH.T).log_softmax(-1)
    loss = (wanted.exp() * (wanted - own)).sum()
    for head in range(2):
        columns_P = output.columns(targets_PK[:, head])
        logits = x_PH @ lm_head_VH[ids_N].T  # a head begins as the identity
        loss = loss + 0.3 * 0.8 ** (head + 1) * torch.nn.functional.cross_entropy(
            logits, columns_P, ignore_index=NO_TARGET, reduction="sum"
        )
    names = list(lora.learnt())
    right = torch.autograd.grad(loss / num_positions, list(lora.learnt().values()))
    assert bool(loss.isfinite()) and len(found) == len(names)
    for name, gradient in zip(names, right, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_family_begins_at_its_base(dtype: str, tiny_mistral: Path, tmp_path: Path) -> None:
    """What was distilled and what is trained are the same model, within the dtype's rounding."""
    run = joint_run(tmp_path, tiny_mistral)
    outcome = make_heads(
        replace(
            run,
            model=replace(run.model, dtype=dtype),
            training=replace(run.training, epochs=1),
            distill=replace(run.distill, max_new_tokens=40),  # beyond the sliding window
        )
    )
    start = outcome.evaluation["training"]["history"][0]
    assert 0 <= start["held_drift"] < (1e-4 if dtype == "float32" else 2e-2)


def test_heads_that_are_there_learn_on(tiny_llama: Path, folder: Path, tmp_path: Path) -> None:
    run = joint_run(tmp_path, tiny_llama)
    start = StartOptions(continue_from=str(folder))
    run = replace(run, start=start, training=replace(run.training, epochs=1))
    history = make_heads(run).evaluation["training"]["history"]
    zeros = json.loads((folder / "evaluation.json").read_text())["training"]["history"][0]
    assert sum(history[0]["held_loss_K"]) < sum(zeros["held_loss_K"])


# -- the same bytes -------------------------------------------------------------------------------


def test_equal_runs_give_equal_files(tiny_llama: Path, folder: Path, tmp_path: Path) -> None:
    run = joint_run(tmp_path, tiny_llama)
    assert contents(make_heads(run).folder) == contents(folder)
    other = replace(run, training=replace(run.training, seed=1), restart=True)
    made = contents(make_heads(other).folder)
    for name in ("adapter_model.safetensors", "medusa_lm_head.safetensors"):
        assert made[name] != contents(folder)[name]


def test_a_run_that_was_killed_goes_on(tiny_llama: Path, folder: Path, tmp_path: Path) -> None:
    run = joint_run(tmp_path, tiny_llama)
    process = FORKS.Process(target=_run_and_die, args=(run,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (run.work / "training.safetensors").exists() and not (run.work / "adapter").exists()
    assert contents(make_heads(run).folder) == contents(folder)


def _run_and_die(run: HeadsRun) -> None:
    """Kills its own process in the middle of an epoch, behind a checkpoint of that epoch."""

    def progress(now: str, done: int, total: int, note: str = "") -> None:
        if now == "training" and done == total // 6 + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        cheap_drafts(),
        patch.object(loop, "CHECKPOINT_SECONDS", 0.0),
    ):
        make_heads(run, progress=progress)


# -- what cannot be -------------------------------------------------------------------------------


def test_without_peft_nothing_begins(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FailedPreconditionError, match=r"pip install 'lorastack\[train\]'"):
        make_heads(joint_run(tmp_path, tiny_llama))
    assert not (tmp_path / "work").exists()


def test_a_quantised_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    run = joint_run(tmp_path, tiny_llama)
    quantised = replace(run, model=replace(run.model, quantize="int8"))
    with pytest.raises(InvalidArgumentError, match="quantised weights"):
        make_heads(quantised)


def test_other_options_for_the_same_folder_are_named(plain: HeadsRun) -> None:
    assert plain.joint is not None
    with pytest.raises(InvalidArgumentError, match="--rank was 4 and is 5"):
        make_heads(replace(plain, joint=replace(plain.joint, rank=5)))
    with pytest.raises(InvalidArgumentError, match="--rank was 4 and is not given"):
        make_heads(replace(plain, joint=None))


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"learning_rate": 0.0}, {"heads_weight": float("nan")}]
)
def test_options_that_cannot_be(options: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="must be"):
        make_heads(replace(joint_run(tmp_path, tiny_llama), joint=JointOptions(**options)))


def test_a_loras_training_that_goes_astray_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    run = joint_run(tmp_path, tiny_llama)
    wild = replace(run, joint=JointOptions(rank=4, learning_rate=1e38))
    with pytest.raises(InvalidArgumentError, match="not finite"):
        make_heads(wild)


def test_without_held_out_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    run = joint_run(tmp_path, tiny_llama)
    training = replace(run.training, epochs=1, held_out=0.0)
    outcome = make_heads(replace(run, training=training))
    assert outcome.served is None and outcome.evaluation["joint"]["drift"] is None
    assert {path.name for path in outcome.folder.iterdir()} >= LORA_FILES
