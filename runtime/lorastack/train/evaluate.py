"""`lorastack train eval`: heads on prompts, told by their ranks and by the engine.

Every file of prompts is answered greedily, one row at a time, without drafts and with each of the
heads (`train.served`). The answers without drafts and their states are a corpus, on which the
heads' guesses are ranked (`train.measure`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lorastack.adapters.formats.medusa import ACCEPTANCE_FIELD, CONFIG_NAME
from lorastack.adapters.store.durable import replace_file
from lorastack.adapters.store.ids import NO_HEADS
from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError
from lorastack.startup.model import StartupProgress
from lorastack.train.corpus import Corpus, CorpusWriter
from lorastack.train.distill import sample_of
from lorastack.train.folder import json_bytes
from lorastack.train.heads import MedusaHeads
from lorastack.train.lm_head import served_lm_head
from lorastack.train.local import LocalEngine, Reply, Selection, open_engine
from lorastack.train.measure import Summary, measure_heads, summary
from lorastack.train.named import NamedHeads, named_heads
from lorastack.train.progress import Progress, silent
from lorastack.train.prompts import Prompt, PromptFile
from lorastack.train.report import summary_json
from lorastack.train.served import serve
from lorastack.train.trainer import matmul_dtype
from lorastack.train.vocabulary import output_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRun:
    """heads: ids or folders. loras: (id, scale) pairs. num_prompts: of each file, spread evenly.

    write_prior: put what serving taught into the folders' config.json.
    """

    heads: tuple[str, ...]
    prompts: tuple[Path, ...]
    model: ModelConfig
    engine: EngineConfig
    adapters: AdapterConfig | None
    loras: tuple[tuple[str, float], ...] = ()
    max_new_tokens: int = 128
    num_prompts: int = 32
    write_prior: bool = False

    def check(self) -> None:
        """Raises InvalidArgumentError for options that contradict each other."""
        if not self.write_prior:
            return
        if len(self.prompts) != 1:
            raise InvalidArgumentError(
                "--write-prior writes what one file of prompts taught: give one --prompts"
            )
        if stored := [name for name in self.heads if not Path(name).is_dir()]:
            raise InvalidArgumentError(
                f"--write-prior writes into folders, and {stored[0]!r} is none: name the heads by "
                "their folder, and upload it again afterwards"
            )


def evaluate(
    run: EvalRun,
    *,
    progress: Progress = silent,
    loading: StartupProgress = lambda label, done, total: None,
) -> dict[str, Any]:
    """JSON: what ran, and `cells`, one for each file and heads. Raises LorastackError.

    What the engine learns from one file is forgotten before the next: a cell depends on its own
    heads and file alone.
    """
    run.check()
    files = [PromptFile(path) for path in run.prompts]
    with open_engine(run.model, run.engine, run.adapters, loading) as engine:
        selection = engine.select(run.loras, NO_HEADS)
        named = [named_heads(engine, name, "--heads") for name in run.heads]
        cells = [
            cell
            for prompts in files
            for cell in _cells(engine, selection, named, prompts, run, progress)
        ]
        backend = engine.model.backend
        return {
            "base_model": engine.model.name,
            "backend": backend.name,
            "dtype": str(backend.dtype).removeprefix("torch."),
            "loras": [{"id": each.lora_id, "scale": each.scale} for each in selection.loras],
            "max_new_tokens": run.max_new_tokens,
            "cells": cells,
        }


def _cells(
    engine: LocalEngine,
    selection: Selection,
    named: Sequence[NamedHeads],
    prompts: PromptFile,
    run: EvalRun,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What all heads are worth on one file."""
    chosen, num_skipped = _chosen(engine, selection, prompts, run)
    stage = f"answering {prompts.path.name}"
    with TemporaryDirectory(prefix="lorastack-eval-") as room:
        with _writer(engine, Path(room)) as writer:

            def keep(index: int, reply: Reply) -> None:
                writer.append(sample_of(chosen[index][0], reply))

            served = serve(
                engine,
                [prompt_ids for _, prompt_ids in chosen],
                selection.loras,
                [each.use for each in named],
                max_new_tokens=run.max_new_tokens,
                on_plain=keep,
                progress=lambda done: progress(stage, done, len(chosen)),
            )
        corpus = Corpus.open(Path(room))
        lm_head_VH, adapted = selected_lm_head(engine, selection)
        cells = []
        for each, result in zip(named, served, strict=True):
            ids_N = None if adapted else each.ids_N
            ranked = ranked_summary(
                each.heads, corpus, range(corpus.num_samples), lm_head_VH, ids_N
            )
            cells.append(
                {
                    "heads": each.name,
                    "file": str(prompts.path),
                    "skipped": num_skipped,
                    "ranked": summary_json(ranked),
                    "served": result.to_json(),
                }
            )
    for each, result in zip(named, served, strict=True):
        engine.forget(each.use)
        if run.write_prior:
            write_prior(each, result.learnt)
    return cells


def ranked_summary(
    heads: MedusaHeads,
    corpus: Corpus,
    samples: Iterable[int],
    lm_head_VH: Tensor,
    ids_N: Tensor | None,
    device: torch.device | None = None,
) -> Summary:
    """What heads are worth on some samples of a corpus, by their guesses' ranks.

    lm_head_VH, ids_N: what they choose through and from, as they are served. device: None for the
    CPU.
    """
    device = device or torch.device("cpu")
    samples = list(samples)
    output = output_of(lm_head_VH, ids_N, device=device, dtype=matmul_dtype(device))
    positions_P = corpus.positions(samples)
    measured = measure_heads(heads.to(device, torch.float32), corpus, positions_P, output)
    lengths_S = (corpus.starts[1:] - corpus.starts[:-1])[samples]
    return summary(measured, [0, *lengths_S.cumsum(0).tolist()])


def selected_lm_head(engine: LocalEngine, selection: Selection) -> tuple[Tensor, bool]:
    """See `served_lm_head`."""
    loras = [(engine.files(use.digest), use.scale) for use in selection.loras]
    return served_lm_head(engine.model.backend, loras)


def write_prior(heads: NamedHeads, learnt: str) -> None:
    """Puts what serving taught into the config.json of heads' folder, where engines start from.

    Raises InvalidArgumentError if nothing was learnt.
    """
    assert heads.folder is not None
    if not learnt:
        raise InvalidArgumentError(
            f"the prompts taught nothing about {heads.name}: give some with longer answers"
        )
    path = heads.folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    replace_file(path, json_bytes({**config, ACCEPTANCE_FIELD: json.loads(learnt)}))


def _chosen(
    engine: LocalEngine, selection: Selection, prompts: PromptFile, run: EvalRun
) -> tuple[list[tuple[Prompt, tuple[int, ...]]], int]:
    """Prompts spread over the file with their tokens; how many others do not fit.

    Raises InvalidArgumentError if none does.
    """
    chosen: list[tuple[Prompt, tuple[int, ...]]] = []
    num_skipped, why = 0, ""
    count = min(run.num_prompts, prompts.num_prompts)
    wanted = {place * prompts.num_prompts // count for place in range(count)}
    for prompt in prompts:
        if prompt.number not in wanted:
            continue
        try:
            prompt_ids = engine.encode(prompt, selection, room=2)
        except InvalidArgumentError as error:
            num_skipped, why = num_skipped + 1, f"line {prompt.line}: {error.message}"
            log.warning("%s: skipped, %s", prompts.path, why)
            continue
        chosen.append((prompt, prompt_ids))
    if not chosen:
        raise InvalidArgumentError(f"{prompts.path}: no prompt can be answered; {why}")
    return chosen, num_skipped


def _writer(engine: LocalEngine, folder: Path) -> CorpusWriter:
    backend = engine.model.backend
    return CorpusWriter(
        folder, settings={}, hidden_size=backend.shapes.hidden_size, dtype=backend.dtype
    )
