"""Self-distillation: a model's own answers to a file of prompts, into a corpus.

Heads must predict what their model says, not what a data set says, so the text that they learn from
is the model's own, LoRAs included. It comes from the engine that serves: many rows at once, drafts
where they pay, and each token with the state that predicted it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lorastack.request import SamplingParams
from lorastack.train.local import LocalEngine, Selection
from lorastack.train.prompts import PromptFile


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions:
    """How answers are made. sampling.seed: each prompt's own seed comes from it and its number.

    num_top: of the model's best tokens to store with each token, for soft targets. drafts: False
    for no speculation; it changes no token.
    """

    max_new_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_top: int = 0
    drafts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """num_done: prompts with a sample or skipped, of num_prompts. num_tokens: of all answers.

    num_skipped: prompts that do not fit the context. tokens_per_second: of this run, answers alone.
    seconds_left: about; None before anything is known.
    """

    num_done: int
    num_prompts: int
    num_skipped: int
    num_tokens: int
    tokens_per_second: float
    seconds_left: float | None


def distill(
    engine: LocalEngine,
    prompts: PromptFile,
    selection: Selection,
    folder: Path,
    options: DistillOptions,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Makes the corpus in `folder` (`train.corpus`), or goes on with it; the last progress.

    The same prompts, selection and options give the same corpus, whatever runs beside a row and
    however often it was interrupted. progress: called after every sample. Raises
    FailedPreconditionError where the folder holds another corpus, ResourceExhaustedError STORE_FULL
    (what is there stays, and the next call goes on), InvalidArgumentError if no prompt fits the
    context, and what a row fails with.
    """
    raise NotImplementedError
