"""What a training run makes of what was learnt: measured in service, and written as a folder.

Shape suffixes: V vocabulary, H hidden, N tokens to choose from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorastack.adapters.formats.medusa import ACCEPTANCE_FIELD
from lorastack.adapters.store.durable import replace_file
from lorastack.errors import InvalidArgumentError
from lorastack.train.bundle import lora_files
from lorastack.train.corpus import Corpus
from lorastack.train.folder import CARD_NAME, EVALUATION_NAME, PLOT_NAME, json_bytes, write_heads
from lorastack.train.joint_options import Drift
from lorastack.train.local import LocalEngine, Selection
from lorastack.train.measure import Summary
from lorastack.train.options import Trained
from lorastack.train.progress import Progress
from lorastack.train.report import Origin, OwnLora, card, evaluation, plot
from lorastack.train.run import HeadsRun
from lorastack.train.served import serve
from lorastack.train.start import Start
from lorastack.train.work import HEADS, SERVED

SERVED_PROMPTS = 16  # held-out ones that the engine answers, one at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
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
class Learnt:
    """trained: its heads as they are written. ids_N: what they choose from, None for all tokens.
    held: samples to measure with; measured: what the heads are worth on them. lora: the files of a
    LoRA that learnt with them; drift: how far it is from the base."""

    corpus: Corpus
    trained: Trained
    ids_N: Tensor | None
    coverage: float
    held: list[int]
    measured: Summary | None
    lora: dict[str, bytes] = field(default_factory=dict)
    drift: Drift | None = None


def measure_served(stage: Stage, learnt: Learnt) -> None:
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


def read_served(root: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What `measure_served` kept: (`Served.to_json`, a calibration); None for what it has not."""
    path = root / SERVED
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["served"], kept[ACCEPTANCE_FIELD]
    except FileNotFoundError:
        return None, None
    except (ValueError, TypeError, KeyError):
        raise InvalidArgumentError(
            f"{path} is damaged: delete it, and the heads are measured again"
        ) from None


def write_result(stage: Stage, learnt: Learnt, folder: Path) -> None:
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
        own_vocabulary=_own_ids(stage, learnt) is not None,
        coverage=learnt.coverage,
        lora=None if run.joint is None else OwnLora(options=run.joint, drift=learnt.drift),
    )
    facts = evaluation(origin, run.training, trained, held)
    # The folder's digest covers it: equal runs shall give equal digests.
    seconds = facts["training"].pop("seconds")
    served, prior = read_served(stage.root)
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
    stage: Stage,
    learnt: Learnt,
    folder: Path,
    files: Mapping[str, bytes] | None = None,
    **more: Any,
) -> None:
    """files, more: see `write_heads`."""
    write_heads(
        folder,
        learnt.trained.heads,
        base_model=stage.engine.model.name,
        ids_N=_own_ids(stage, learnt),
        shared=stage.start.shared,
        files=learnt.lora | dict(files or {}),
        **more,
    )


def _own_ids(stage: Stage, learnt: Learnt) -> Tensor | None:
    """The draft vocabulary that the heads bring; None where they bring none."""
    return None if learnt.ids_N is stage.start.ids_N else learnt.ids_N


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
