"""From a file of prompts to heads: distil, train, measure, write, upload.

Every stage keeps what it makes in the work folder (`train.work`), so the same command goes on where
an earlier one was ended: a finished stage is read, an unfinished one goes on.

Shape suffixes: V vocabulary, H hidden, N tokens to choose from.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorastack.adapters.store.durable import disk_full_is_exhaustion
from lorastack.adapters.store.ids import check_new_id
from lorastack.errors import InvalidArgumentError
from lorastack.startup.device import find_device
from lorastack.startup.model import StartupProgress
from lorastack.train import distill as distilling
from lorastack.train import options
from lorastack.train.bundle import check_bundle, lora_files
from lorastack.train.corpus import Corpus
from lorastack.train.distill import distill
from lorastack.train.evaluate import ranked_summary, selected_lm_head
from lorastack.train.folder import EVALUATION_NAME, stored
from lorastack.train.joint import train_joint
from lorastack.train.joint_options import JointOptions
from lorastack.train.local import LocalEngine, open_engine
from lorastack.train.lora import check_peft
from lorastack.train.progress import Progress, silent
from lorastack.train.prompts import PromptFile
from lorastack.train.publish import Publication, folder_digest
from lorastack.train.result import Learnt, Stage, measure_served, read_served, write_result
from lorastack.train.run import ANSWERS, HeadsRun, options_of
from lorastack.train.start import open_start
from lorastack.train.trainer import train_heads
from lorastack.train.vocabulary import choose_vocabulary, count_tokens, coverage
from lorastack.train.work import ADAPTER, CHECKPOINT, CORPUS, WorkFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has made. evaluation: that of its folder. served: see `Served.to_json`; None
    without held-out prompts."""

    folder: Path
    digest: str
    distilled: distilling.Progress
    evaluation: dict[str, Any]
    served: dict[str, Any] | None


def make_heads(
    run: HeadsRun,
    *,
    publication: Publication | None = None,
    progress: Progress = silent,
    loading: StartupProgress = lambda label, done, total: None,
) -> Outcome:
    """Does what of the run is not done yet.

    publication: where the result is uploaded to; None: nowhere. loading: the progress of the
    model's loading. Raises LorastackError; what was done stays.
    """
    check_new_id(run.adapter_id)
    run.start.check()
    run.training.check()
    if run.joint is not None:
        run.joint.check()
        check_peft()
    prompts = PromptFile(run.prompts)
    full = f"the disk of {run.work} is full: free some space and run the same command again"
    with closing(WorkFolder(run.work)) as work, disk_full_is_exhaustion(full):
        folder = work.root / ADAPTER
        made = None if run.restart else folder
        theirs = None if publication is None else publication.check(made)
        with open_engine(run.model, run.engine, run.adapters, loading) as engine:
            if publication is not None and theirs is not None:
                publication.check_base(theirs, engine.model.fingerprint)
            stage = _begin(run, work, prompts, engine, progress)
            report = partial(_report_distilling, progress)
            selection, corpus = stage.selection, work.root / CORPUS
            distilled = distill(engine, prompts, selection, corpus, run.distill, report)
            if not folder.is_dir():
                _make_folder(stage, folder)
        if publication is not None:
            publication.upload(folder, partial(progress, "uploading bytes"))
        return Outcome(
            folder=folder,
            digest=folder_digest(folder),
            distilled=distilled,
            evaluation=json.loads((folder / EVALUATION_NAME).read_text(encoding="utf-8")),
            served=read_served(work.root)[0],
        )


def _begin(
    run: HeadsRun, work: WorkFolder, prompts: PromptFile, engine: LocalEngine, progress: Progress
) -> Stage:
    """Resolves what the run names, and claims the work folder for it."""
    selection = engine.select(run.loras)
    if run.joint is not None and engine.model.backend.quantization:
        raise InvalidArgumentError(
            f"{engine.model.name} has quantised weights, and a LoRA learns on plain ones: name the "
            "model that it was made from"
        )
    if run.bundle:
        check_bundle(selection.loras)
        lora_files(engine, selection.loras[0])
    start = open_start(engine, run.start, run.training.seed)
    if start.use is not None:  # drafts of these speed the distilling up
        selection = replace(selection, heads=start.use)
    shapes = engine.model.backend.shapes
    choose_vocabulary(torch.zeros(shapes.vocab_size), run.draft_vocabulary)  # is the size sound?
    if run.distill.num_top > shapes.vocab_size:
        raise InvalidArgumentError(
            f"--soft-targets {run.distill.num_top}: the model has {shapes.vocab_size} tokens"
        )
    options = options_of(run, prompts, engine, selection, start)
    work.claim(options, restart=run.restart, answers=ANSWERS)
    lm_head_VH, adapted = selected_lm_head(engine, selection)
    return Stage(
        run=run,
        root=work.root,
        engine=engine,
        selection=selection,
        start=start,
        lm_head_VH=lm_head_VH,
        adapted=adapted,
        device=find_device(run.model.device),
        progress=progress,
    )


def _make_folder(stage: Stage, folder: Path) -> None:
    """The stages from a corpus to the adapter's folder."""
    learnt = _train(stage)
    if learnt.held:
        measure_served(stage, learnt)
    write_result(stage, learnt, folder)


def _train(stage: Stage) -> Learnt:
    run, start = stage.run, stage.start
    corpus = Corpus.open(stage.root / CORPUS)
    taught, held = corpus.split(run.training.held_out)
    vocab_size = stage.engine.model.backend.shapes.vocab_size
    count_V = count_tokens(map(corpus.answers, taught), vocab_size)
    ids_N = choose_vocabulary(count_V, run.draft_vocabulary)
    if ids_N is None:
        ids_N = start.ids_N
    if stage.adapted:
        ids_N = None
    share = 1.0 if ids_N is None else coverage(ids_N, count_V)
    if run.joint is not None:
        return _train_joint(stage, run.joint, corpus, ids_N, share, held)
    trained = train_heads(
        start.heads,
        corpus,
        stage.lm_head_VH,
        ids_N,
        run.training,
        checkpoint=stage.root / CHECKPOINT,
        device=stage.device,
        progress=partial(_report_training, stage.progress),
    )
    trained = replace(trained, heads=stored(trained.heads))
    measured = None
    if held:
        measured = ranked_summary(
            trained.heads, corpus, held, stage.lm_head_VH, ids_N, stage.device
        )
    return Learnt(
        corpus=corpus,
        trained=trained,
        ids_N=ids_N,
        coverage=share,
        held=held,
        measured=measured,
    )


def _train_joint(
    stage: Stage,
    joint: JointOptions,
    corpus: Corpus,
    ids_N: Tensor | None,
    share: float,
    held: list[int],
) -> Learnt:
    """As `_train`, with a LoRA that learns too. share: see `coverage`."""
    model = stage.engine.model
    learnt = train_joint(
        stage.start.heads,
        model.files.folder,
        corpus,
        stage.lm_head_VH,
        ids_N,
        stage.run.training,
        joint,
        checkpoint=stage.root / CHECKPOINT,
        device=stage.device,
        progress=partial(_report_training, stage.progress),
    )
    return Learnt(
        corpus=corpus,
        trained=learnt.trained,
        ids_N=ids_N,
        coverage=share,
        held=held,
        measured=None if learnt.held is None else learnt.held.summary(),
        lora=learnt.lora.files(model.name),
        drift=None if learnt.held is None else learnt.held.drift,
    )


def _report_distilling(progress: Progress, state: distilling.Progress) -> None:
    done = state.num_samples + state.num_skipped
    note = f"{state.num_tokens} tokens, {state.tokens_per_second:.0f} a second"
    progress("distilling", done, state.num_prompts, note)


def _report_training(progress: Progress, state: options.Progress) -> None:
    note = f"epoch {state.epoch} of {state.num_epochs}, loss by head "
    note += " ".join(f"{loss:.2f}" for loss in state.loss_K)
    if state.drift is not None:
        note += f", drift {state.drift:.4f}"
    progress("training", state.step, state.num_steps, note)
