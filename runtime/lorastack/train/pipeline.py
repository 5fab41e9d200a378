"""From a file of prompts to heads: distil, train, measure, write, upload.

Every stage keeps what it makes in the work folder (`train.work`), so the same command goes on where
an earlier one was ended: a finished stage is read, an unfinished one goes on.

Shape suffixes: V vocabulary, H hidden, N tokens to choose from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorastack.adapters.formats.medusa import ACCEPTANCE_FIELD
from lorastack.adapters.store.durable import disk_full_is_exhaustion, replace_file
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
from lorastack.train.folder import (
    CARD_NAME,
    EVALUATION_NAME,
    PLOT_NAME,
    json_bytes,
    stored,
    write_heads,
)
from lorastack.train.joint import train_joint
from lorastack.train.joint_options import Drift, JointOptions
from lorastack.train.local import LocalEngine, Selection, open_engine
from lorastack.train.lora import check_peft
from lorastack.train.measure import Summary
from lorastack.train.options import Trained
from lorastack.train.progress import Progress, silent
from lorastack.train.prompts import PromptFile
from lorastack.train.publish import Publication, folder_digest
from lorastack.train.report import Origin, OwnLora, card, evaluation, plot
from lorastack.train.run import HeadsRun, options_of
from lorastack.train.served import serve
from lorastack.train.start import Start, open_start
from lorastack.train.trainer import train_heads
from lorastack.train.vocabulary import choose_vocabulary, count_tokens, coverage
from lorastack.train.work import ADAPTER, CHECKPOINT, CORPUS, HEADS, SERVED, WorkFolder

SERVED_PROMPTS = 16  # held-out ones that the engine answers, one at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run has made. evaluation: that of its folder. served: see `Served.to_json`; None
    without held-out prompts."""

    folder: Path
    digest: str
    distilled: distilling.Progress
    evaluation: dict[str, Any]
    served: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What the stages of a run share. adapted: a LoRA changes lm_head, so that heads choose from
    all tokens."""

    run: HeadsRun
    root: Path
    engine: LocalEngine
    selection: Selection
    start: Start
    lm_head_VH: Tensor
    adapted: bool
    device: torch.device
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class _Learnt:
    """trained: its heads as they are written. held: samples to measure with; measured: what the
    heads are worth on them. lora: the files of a LoRA that learnt with them; drift: how far it is
    from the base."""

    corpus: Corpus
    trained: Trained
    ids_N: Tensor | None
    coverage: float
    held: list[int]
    measured: Summary | None
    lora: dict[str, bytes] = field(default_factory=dict)
    drift: Drift | None = None


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
            served=_read_served(work.root)[0],
        )


def _begin(
    run: HeadsRun, work: WorkFolder, prompts: PromptFile, engine: LocalEngine, progress: Progress
) -> _Stage:
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
    work.claim(options_of(run, prompts, engine, selection, start), restart=run.restart)
    lm_head_VH, adapted = selected_lm_head(engine, selection)
    return _Stage(
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


def _make_folder(stage: _Stage, folder: Path) -> None:
    """The stages from a corpus to the adapter's folder."""
    learnt = _train(stage)
    if learnt.held:
        _serve(stage, learnt)
    _write(stage, learnt, folder)


def _train(stage: _Stage) -> _Learnt:
    run, start = stage.run, stage.start
    corpus = Corpus.open(stage.root / CORPUS)
    taught, held = corpus.split(run.training.held_out)
    vocab_size = stage.engine.model.backend.shapes.vocab_size
    count_V = count_tokens(map(corpus.answers, taught), vocab_size)
    ids_N = start.ids_N
    if start.shared is None:
        ids_N = choose_vocabulary(count_V, run.draft_vocabulary)
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
    return _Learnt(
        corpus=corpus,
        trained=trained,
        ids_N=ids_N,
        coverage=share,
        held=held,
        measured=measured,
    )


def _train_joint(
    stage: _Stage,
    joint: JointOptions,
    corpus: Corpus,
    ids_N: Tensor | None,
    share: float,
    held: list[int],
) -> _Learnt:
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
    return _Learnt(
        corpus=corpus,
        trained=learnt.trained,
        ids_N=ids_N,
        coverage=share,
        held=held,
        measured=None if learnt.held is None else learnt.held.summary(),
        lora=learnt.lora.files(model.name),
        drift=None if learnt.held is None else learnt.held.drift,
    )


def _serve(stage: _Stage, learnt: _Learnt) -> None:
    """Measures the heads in service, once: SERVED keeps it."""
    if (stage.root / SERVED).exists():
        return
    folder, engine = stage.root / HEADS, stage.engine
    _write_heads(stage, learnt, folder, replace=True)
    added = engine.add_folder(folder)
    assert added.heads is not None
    stride = -(-len(learnt.held) // SERVED_PROMPTS)
    prompts = [learnt.corpus.prompt(sample).tolist() for sample in learnt.held[::stride]]
    (result,) = serve(
        engine,
        prompts,
        added.loras or stage.selection.loras,
        [added.heads],
        max_new_tokens=stage.run.distill.max_new_tokens,
        progress=lambda done: stage.progress("measuring", done, len(prompts)),
    )
    prior = json.loads(result.learnt) if result.learnt else None
    kept = {"served": result.to_json(), ACCEPTANCE_FIELD: prior}
    replace_file(stage.root / SERVED, json_bytes(kept))


def _read_served(root: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What `_serve` kept: (`Served.to_json`, a calibration); None for what it has not."""
    try:
        kept = json.loads((root / SERVED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, None
    return kept["served"], kept[ACCEPTANCE_FIELD]


def _write(stage: _Stage, learnt: _Learnt, folder: Path) -> None:
    """Writes the adapter's folder with all that lies beside the heads."""
    run, corpus, trained, held = stage.run, learnt.corpus, learnt.trained, learnt.measured
    origin = Origin(
        name=run.adapter_id,
        base_model=stage.engine.model.name,
        command=run.command,
        data=corpus.settings,
        loras=[_lora_name(use.lora_id, use.scale) for use in stage.selection.loras],
        shared="" if stage.start.shared is None else stage.start.shared.id,
        vocabulary_size=0 if learnt.ids_N is None else len(learnt.ids_N),
        coverage=learnt.coverage,
        lora=None if run.joint is None else OwnLora(options=run.joint, drift=learnt.drift),
    )
    facts = evaluation(origin, run.training, trained, held)
    # The folder's digest covers it: equal runs shall give equal digests.
    seconds = facts["training"].pop("seconds")
    served, prior = _read_served(stage.root)
    text = card(origin, run.training, trained, held) + _served_text(served, seconds)
    files = {CARD_NAME: text.encode(), EVALUATION_NAME: json_bytes(facts)}
    if (image := plot(trained, held)) is not None:
        files[PLOT_NAME] = image
    if run.bundle:
        files |= lora_files(stage.engine, stage.selection.loras[0])
    fields: dict[str, Any] = {}
    if held is not None:
        fields["medusa_choices"] = [list(path) for path in held.choices]
    if prior is not None:
        fields[ACCEPTANCE_FIELD] = prior
    _write_heads(stage, learnt, folder, fields=fields, files=files)


def _write_heads(
    stage: _Stage,
    learnt: _Learnt,
    folder: Path,
    files: Mapping[str, bytes] | None = None,
    **more: Any,
) -> None:
    """files, more: see `write_heads`."""
    write_heads(
        folder,
        learnt.trained.heads,
        base_model=stage.engine.model.name,
        ids_N=learnt.ids_N,
        shared=stage.start.shared,
        files=learnt.lora | dict(files or {}),
        **more,
    )


def _lora_name(lora_id: str, scale: float) -> str:
    return lora_id if scale == 1.0 else f"{lora_id}:{scale:g}"


def _served_text(served: dict[str, Any] | None, seconds: float) -> str:
    """What the card says about the machine's own times."""
    lines = [f"Training took {seconds / 60:.1f} minutes."]
    if served is not None:
        lines.insert(
            0,
            f"Served with adaptive trees, one row at a time, greedy, on {served['prompts']} of "
            f"these prompts: {served['tokens_a_step']:.2f} tokens a step, "
            f"{served['speed_up']:.2f} times the tokens a second of decoding without drafts.",
        )
    return "\n" + "\n".join(lines) + "\n"


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
