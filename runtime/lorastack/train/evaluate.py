"""`lorastack train eval`: heads on prompts, told by their ranks and by the engine.

Every file of prompts is answered greedily, one row at a time, without drafts and with each of the
heads (`train.served`). The answers without drafts and their states are a corpus, on which the
heads' guesses are ranked (`train.measure`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from lorastack.adapters.formats.medusa import CONFIG_NAME
from lorastack.adapters.store.durable import replace_file
from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError
from lorastack.startup.model import StartupProgress
from lorastack.train.corpus import Corpus, CorpusWriter, Sample
from lorastack.train.folder import json_bytes
from lorastack.train.lm_head import served_lm_head
from lorastack.train.local import LocalEngine, Reply, Selection, open_engine
from lorastack.train.measure import measure_heads, summary
from lorastack.train.named import NamedHeads, named_heads
from lorastack.train.progress import Progress, silent
from lorastack.train.prompts import Prompt, PromptFile
from lorastack.train.report import summary_json
from lorastack.train.served import Served, serve
from lorastack.train.trainer import matmul_dtype
from lorastack.train.vocabulary import output_of

ACCEPTANCE_FIELD = "acceptance"


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
    chosen, skipped = _chosen(engine, selection, prompts, run)
    stage = f"answering {prompts.path.name}"
    with TemporaryDirectory(prefix="lorastack-eval-") as room:
        folder = Path(room) / "corpus"
        with _writer(engine, folder) as writer:

            def keep(index: int, reply: Reply) -> None:
                prompt, prompt_ids = chosen[index]
                writer.append(_sample(prompt, prompt_ids, reply))

            served = serve(
                engine,
                [prompt_ids for _, prompt_ids in chosen],
                selection.loras,
                [each.use for each in named],
                max_new_tokens=run.max_new_tokens,
                on_plain=keep,
                progress=lambda done: progress(stage, done, len(chosen)),
            )
        corpus = Corpus.open(folder)
        positions_P = torch.arange(corpus.num_tokens)
        cells = []
        for index, each in enumerate(named):
            output = _output(engine, selection, each.ids_N)
            measured = measure_heads(each.heads.to(...), corpus, positions_P, output)
            cells.append(...)
    return cells
