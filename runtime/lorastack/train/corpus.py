"""What a model said, on disk: the tokens of its answers, and the states that predicted them.

A folder of files that only grow, one sample (a prompt and its answer) behind the other:

    corpus.json       what it is of (settings), and the form of the rest
    prompts.bin       int32: the prompts' tokens
    answers.bin       int32 [T]: the answers'
    hidden.bin        float32 or bfloat16 [T, H]: states after the final norm
    top_ids.bin       int32 [T, N], only with N > 0: the model's N best tokens
    top_logprobs.bin  float32 [T, N], and their log-probabilities
    samples.bin       a record a sample, written last: what no record covers does not count

So whatever kills the writer costs at most the sample at hand. Readers map the files into memory.

Samples are stored in the order in which they ended, and read in that of their prompts: what a
reader sees depends neither on the batches that made the corpus nor on interruptions.

Shape suffixes: T tokens of all answers, P positions that are asked for, K heads, H hidden, N best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NO_TARGET = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A prompt and the model's own answer, whose end token belongs to it if it came.

    number: the prompt's in its file; a corpus has one sample of a number. prompt_key: see
    `Prompt.key`. hidden_TH: row t predicted answer token t. top_ids_TN, top_logprobs_TN: what the
    model held likeliest there, best first; None in a corpus without.
    """

    number: int
    prompt_key: int
    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    hidden_TH: Tensor
    top_ids_TN: Tensor | None = None
    top_logprobs_TN: Tensor | None = None


class CorpusWriter:
    """Appends to a corpus; one process at a time. A context manager, which closes it.

    numbers: of the samples that are there. num_samples, num_tokens: of all that are there.
    """

    numbers: set[int]
    num_samples: int
    num_tokens: int

    def __init__(
        self,
        folder: Path,
        *,
        settings: Mapping[str, Any],
        hidden_size: int,
        dtype: torch.dtype,
        num_top: int = 0,
    ) -> None:
        """Begins a corpus, or goes on with the one in the folder, without what a kill left torn.

        settings: what the corpus is of, JSON. num_top: N. Raises FailedPreconditionError for a
        corpus of other settings, naming them, or one that another process writes;
        ResourceExhaustedError STORE_FULL.
        """

    def append(self, sample: Sample) -> None:
        """Add a sample. Raises ResourceExhaustedError STORE_FULL; the samples before it stay."""

    def close(self) -> None:
        """Ends the writing; everything is on the disk."""


class Corpus:
    """A corpus for reading. Its positions count the answers' tokens, sample after sample.

    The state of position t of a sample predicted its answer token t. Head k, from 1, learns there
    what came k tokens later; where the sample has ended by then, it learns nothing.

    settings: see `CorpusWriter`. starts: int64 [S + 1]: sample i has positions starts[i] up to
    starts[i + 1]. num_top: N.
    """

    settings: Mapping[str, Any]
    hidden_size: int
    dtype: torch.dtype
    num_top: int
    num_samples: int
    num_tokens: int
    starts: Tensor

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Raises FailedPreconditionError if the folder holds no corpus that this version reads."""
        raise NotImplementedError

    def number(self, sample: int) -> int:
        """The number of the sample's prompt in its file; numbers rise with samples."""
        raise NotImplementedError

    def prompt_key(self, sample: int) -> int:
        """See `Prompt.key`."""
        raise NotImplementedError

    def prompt(self, sample: int) -> Tensor:
        """int64: the prompt's tokens."""
        raise NotImplementedError

    def answers(self, sample: int) -> Tensor:
        """int64: the answer's tokens."""
        raise NotImplementedError

    def split(self, held_out: float) -> tuple[list[int], list[int]]:
        """(samples to train on, samples held out): all samples of a prompt are on one side.

        held_out: about this share of the prompts. Whether one is held out depends on its key alone,
        so it is in a longer corpus as well. With two prompts or more neither side is empty, unless
        held_out is 0.
        """
        raise NotImplementedError

    def positions(self, samples: Iterable[int]) -> Tensor:
        """int64 [P]: all positions of these samples, in their order."""
        raise NotImplementedError

    def tokens(self, positions_P: Tensor) -> Tensor:
        """int64 [P]: the answers' tokens."""
        raise NotImplementedError

    def targets(self, positions_P: Tensor, num_heads: int) -> Tensor:
        """int64 [P, K]: what head k (column k - 1) learns at each position, or NO_TARGET."""
        raise NotImplementedError

    def hidden(self, positions_P: Tensor) -> Tensor:
        """[P, H] in `dtype`, read from the disk (or its cache) for these positions alone."""
        raise NotImplementedError

    def top(self, positions_P: Tensor) -> tuple[Tensor, Tensor]:
        """(int64 ids, float32 log-probabilities), [P, N] both: of the token at each position.

        Head k's at position p are those of position p + k, where `targets` has a token. Natural
        logarithms of the model's own distribution, before temperature and filters.
        """
        raise NotImplementedError
