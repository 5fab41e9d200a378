"""What a model said, on disk: the tokens of its answers, and the states that predicted them.

A folder of files that only grow, one sample (a prompt and its answer) behind the other:

    corpus.json       what it is of (settings), and the form of the rest
    prompts.bin       int32: the prompts' tokens
    answers.bin       int32 [T]: the answers'
    hidden.bin        [T, H], in the model's dtype: states after the final norm
    top_ids.bin       int32 [T, N], only with N > 0: the model's N best tokens
    top_logprobs.bin  float32 [T, N], and their log-probabilities
    samples.bin       a record a sample, written last: what no record covers does not count

So whatever kills the writer costs at most the sample at hand. Readers map the files into memory.

Samples are stored in the order in which they ended, and read in that of their prompts: what a
reader sees depends neither on the batches that made the corpus nor on interruptions.

Shape suffixes: S samples, T tokens of all answers, P positions that are asked for, K heads,
H hidden, N best.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorastack.adapters.store.durable import disk_full_is_exhaustion, replace_file
from lorastack.errors import FailedPreconditionError, Reason
from lorastack.train.corpus_files import (
    ABOUT,
    ANSWERS,
    HIDDEN,
    PROMPTS,
    RECORD,
    SAMPLES,
    TOP_IDS,
    TOP_LOGPROBS,
    Array,
    Form,
    Sample,
    checksum,
    mapped,
    opened,
    read_about,
    write,
)

__all__ = ["NO_TARGET", "Corpus", "CorpusWriter", "Sample"]

NO_TARGET = -1


class CorpusWriter:
    """Appends to a corpus; one process at a time. A context manager, which closes it.

    numbers: of the samples that are there. num_tokens: of their answers.
    """

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
        self._folder = folder
        self._form = Form(hidden_size, dtype, num_top)
        self.numbers: set[int] = set()
        self.num_tokens = 0
        self._num_prompts = 0  # tokens
        self._handles: list[int] = []
        try:
            with disk_full_is_exhaustion(self._full()):
                folder.mkdir(parents=True, exist_ok=True)
                self._handles = [opened(folder / name) for name in self._form.files]
                self._lock()
                self._begin(settings)
                self._recover()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def num_samples(self) -> int:
        """All that are there."""
        return len(self.numbers)

    def append(self, sample: Sample) -> None:
        """Add a sample. Raises ResourceExhaustedError STORE_FULL; the samples before it stay."""
        assert sample.number not in self.numbers and len(sample.answer_ids)
        parts = self._form.parts(sample)
        record = np.zeros(1, RECORD)
        record["number"], record["key"] = sample.number, sample.prompt_key
        record["num_prompt"], record["num_answer"] = len(sample.prompt_ids), len(sample.answer_ids)
        record["crc"] = checksum(record, parts)
        try:
            with disk_full_is_exhaustion(self._full()):
                for handle, part in zip(self._handles, (*parts, record.tobytes()), strict=True):
                    write(handle, part)
        except BaseException:
            self._cut()
            raise
        self._count(record)

    def close(self) -> None:
        """Ends the writing; everything is on the disk."""
        try:
            with disk_full_is_exhaustion(self._full()):
                for handle in self._handles:
                    os.fsync(handle)
        finally:
            self._close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FailedPreconditionError(
                f"another process writes the corpus in {self._folder}: wait for it, or choose "
                "another folder",
                reason=Reason.STORE_IN_USE,
            ) from error

    def _begin(self, settings: Mapping[str, Any]) -> None:
        """Writes corpus.json, or checks that what is there says the same."""
        about = json.loads(json.dumps({**self._form.about(), "settings": dict(settings)}))
        path = self._folder / ABOUT
        if not path.exists():
            replace_file(path, json.dumps(about, indent=2).encode() + b"\n")
            return
        found = read_about(self._folder)
        before, now = ({**each, **each["settings"]} for each in (found, about))
        names = sorted(before.keys() | now.keys() - {"settings"})
        differing = [
            f"{name} {before.get(name)!r}, not {now.get(name)!r}"
            for name in names
            if name != "settings" and before.get(name) != now.get(name)
        ]
        if differing:
            raise FailedPreconditionError(
                f"the corpus in {self._folder} was made with {'; '.join(differing)}: repeat the "
                "options that it was made with, or choose another folder",
                reason=Reason.STORE_FORMAT,
            )

    def _recover(self) -> None:
        """Counts the samples up to the first that is not whole, and cuts it and all others off."""
        with open(self._folder / SAMPLES, "rb") as file:
            data = file.read()
        records = np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)
        files = [open(self._folder / name, "rb") for name in self._form.files[:-1]]  # noqa: SIM115
        try:
            for at in range(len(records)):
                record = records[at : at + 1]
                sizes = self._form.sizes(record)
                parts = [file.read(size) for file, size in zip(files, sizes, strict=True)]
                if checksum(record, parts) != record["crc"][0]:
                    break
                self._count(record)
        finally:
            for each in files:
                each.close()
        self._cut()

    def _count(self, record: Array) -> None:
        self.numbers.add(int(record["number"][0]))
        self.num_tokens += int(record["num_answer"][0])
        self._num_prompts += int(record["num_prompt"][0])

    def _cut(self) -> None:
        """Cuts every file behind the samples that count."""
        sizes = self._form.sizes_of(self._num_prompts, self.num_tokens)
        for handle, size in zip(
            self._handles, (*sizes, self.num_samples * RECORD.itemsize), strict=True
        ):
            os.ftruncate(handle, size)

    def _close(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            os.close(handle)

    def _full(self) -> str:
        return (
            f"the disk of {self._folder} is full: the {len(self.numbers)} samples there stay; free "
            "some space and run the same command again, which goes on from there"
        )


class Corpus:
    """A corpus for reading. Its positions count the answers' tokens, sample after sample.

    The state of position t of a sample predicted its answer token t. Head k, from 1, learns there
    what came k tokens later; where the sample has ended by then, it learns nothing.

    settings: see `CorpusWriter`. starts: int64 [S + 1]: sample i has positions starts[i] up to
    starts[i + 1]. num_top: N.
    """

    def __init__(self, folder: Path) -> None:
        """See `open`."""
        about = read_about(folder)
        self.settings: Mapping[str, Any] = about["settings"]
        form = Form.of(about)
        self.hidden_size, self.dtype, self.num_top = form.hidden_size, form.dtype, form.num_top
        records = form.whole(folder)
        if not len(records):
            raise FailedPreconditionError(
                f"the corpus in {folder} holds no samples yet: distil into it first",
                reason=Reason.STORE_FORMAT,
            )
        ends_S = np.cumsum(records["num_answer"], dtype=np.int64)
        prompt_ends_S = np.cumsum(records["num_prompt"], dtype=np.int64)
        order_S = np.argsort(records["number"])
        self._records = records[order_S]
        lengths_S = self._records["num_answer"].astype(np.int64)
        self.starts = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths_S))))
        # Where a sample lies in the files, less where its positions begin.
        places_S = (ends_S[order_S] - lengths_S) - self.starts[:-1].numpy()
        self._shift_S = torch.from_numpy(places_S)
        self._prompt_ends_S = prompt_ends_S[order_S]
        num_tokens, num_prompts = self.num_tokens, int(prompt_ends_S[-1])
        self._prompts = mapped(folder / PROMPTS, torch.int32, (num_prompts,))
        self._answers_T = mapped(folder / ANSWERS, torch.int32, (num_tokens,))
        self._hidden_TH = mapped(folder / HIDDEN, self.dtype, (num_tokens, self.hidden_size))
        if self.num_top:
            shape = (num_tokens, self.num_top)
            self._top_ids_TN = mapped(folder / TOP_IDS, torch.int32, shape)
            self._top_logprobs_TN = mapped(folder / TOP_LOGPROBS, torch.float32, shape)

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """As it is now: what a writer adds later is not seen.

        Raises FailedPreconditionError if the folder holds no corpus that this version reads, or no
        sample.
        """
        return cls(folder)

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self._records)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.starts[-1])

    def number(self, sample: int) -> int:
        """The number of the sample's prompt in its file; numbers rise with samples."""
        return int(self._records["number"][sample])

    def prompt_key(self, sample: int) -> int:
        """See `Prompt.key`."""
        return int(self._records["key"][sample])

    def prompt(self, sample: int) -> Tensor:
        """int64: the prompt's tokens."""
        end = int(self._prompt_ends_S[sample])
        return self._prompts[end - int(self._records["num_prompt"][sample]) : end].long()

    def answers(self, sample: int) -> Tensor:
        """int64: the answer's tokens."""
        return self.tokens(self.positions([sample]))

    def split(self, held_out: float) -> tuple[list[int], list[int]]:
        """(samples to train on, samples held out): all samples of a prompt are on one side.

        held_out: about this share of the prompts. Whether one is held out depends on its key alone,
        so it is in a longer corpus as well. With two prompts or more neither side is empty, unless
        held_out is 0.
        """
        keys = sorted({self.prompt_key(sample) for sample in range(self.num_samples)})
        count = sum(key < held_out * 2**64 for key in keys)
        if held_out > 0 and len(keys) > 1:
            count = min(max(count, 1), len(keys) - 1)
        held = set(keys[:count])
        sides: tuple[list[int], list[int]] = [], []
        for sample in range(self.num_samples):
            sides[self.prompt_key(sample) in held].append(sample)
        return sides

    def positions(self, samples: Iterable[int]) -> Tensor:
        """int64 [P]: all positions of these samples, in their order."""
        starts = self.starts.tolist()
        ranges = [torch.arange(starts[sample], starts[sample + 1]) for sample in samples]
        return torch.cat([torch.empty(0, dtype=torch.int64), *ranges])

    def tokens(self, positions_P: Tensor) -> Tensor:
        """int64 [P]: the answers' tokens."""
        return self._answers_T[self._places(positions_P)].long()

    def targets(self, positions_P: Tensor, num_heads: int) -> Tensor:
        """int64 [P, K]: what head k (column k - 1) learns at each position, or NO_TARGET."""
        later_PK = positions_P[:, None] + torch.arange(1, num_heads + 1)
        inside_PK = later_PK < self.starts[self._samples(positions_P) + 1][:, None]
        tokens_PK = self.tokens(later_PK.where(inside_PK, 0).flatten()).view_as(later_PK)
        return tokens_PK.where(inside_PK, NO_TARGET)

    def hidden(self, positions_P: Tensor) -> Tensor:
        """[P, H] in `dtype`, read from the disk (or its cache) for these positions alone."""
        return self._hidden_TH[self._places(positions_P)]

    def top(self, positions_P: Tensor) -> tuple[Tensor, Tensor]:
        """(int64 ids, float32 log-probabilities), [P, N] both: of the token at each position.

        Head k's at position p are those of position p + k, where `targets` has a token. Natural
        logarithms of the model's own distribution, before temperature and filters.
        """
        places_P = self._places(positions_P)
        return self._top_ids_TN[places_P].long(), self._top_logprobs_TN[places_P]

    def _samples(self, positions_P: Tensor) -> Tensor:
        """int64 [P]: the sample of each position."""
        return torch.searchsorted(self.starts, positions_P, right=True) - 1

    def _places(self, positions_P: Tensor) -> Tensor:
        """int64 [P]: where each position's token lies in the files."""
        return positions_P + self._shift_S[self._samples(positions_P)]
