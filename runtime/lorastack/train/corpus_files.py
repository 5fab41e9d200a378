"""The files of a corpus: their names, how wide they are, and when a sample is whole.

Shape suffixes: see `train.corpus`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorastack.errors import FailedPreconditionError, Reason

Array = npt.NDArray[Any]

FORMAT = "lorastack corpus 1"
ABOUT, SAMPLES = "corpus.json", "samples.bin"
PROMPTS, ANSWERS, HIDDEN = "prompts.bin", "answers.bin", "hidden.bin"
TOP_IDS, TOP_LOGPROBS = "top_ids.bin", "top_logprobs.bin"
# num_prompt, num_answer: tokens. crc: of the fields before it and the sample's bytes in all files.
RECORD = np.dtype(
    [
        ("number", "<i8"),
        ("key", "<u8"),
        ("num_prompt", "<i4"),
        ("num_answer", "<i4"),
        ("crc", "<u4"),
    ]
)
_BEFORE_CRC = 24  # bytes of a record
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@dataclass(frozen=True, slots=True)
class Form:
    """Which files a corpus has, and how wide."""

    hidden_size: int
    dtype: torch.dtype
    num_top: int

    @staticmethod
    def of(about: Mapping[str, Any]) -> Form:
        return Form(about["hidden_size"], _DTYPES[about["dtype"]], about["num_top"])

    def about(self) -> dict[str, Any]:
        """What corpus.json says of it."""
        dtype = next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)
        return {
            "format": FORMAT,
            "hidden_size": self.hidden_size,
            "dtype": dtype,
            "num_top": self.num_top,
        }

    @property
    def files(self) -> tuple[str, ...]:
        """Their names, in the order in which they are written."""
        top = (TOP_IDS, TOP_LOGPROBS) if self.num_top else ()
        return (PROMPTS, ANSWERS, HIDDEN, *top, SAMPLES)

    def sizes_of(self, num_prompt: int, num_answer: int) -> list[int]:
        """Bytes of so many tokens, by file but the last."""
        widths = [4, self.hidden_size * self.dtype.itemsize]
        widths += [4 * self.num_top] * 2 if self.num_top else []
        return [4 * num_prompt, *(width * num_answer for width in widths)]

    def sizes(self, record: Array) -> list[int]:
        """The same of the tokens of one sample."""
        return self.sizes_of(int(record["num_prompt"][0]), int(record["num_answer"][0]))

    def parts(self, sample: Sample) -> list[bytes]:
        """A sample's bytes, by file but the last."""
        num_answer = len(sample.answer_ids)
        assert sample.hidden_TH.shape == (num_answer, self.hidden_size)
        assert sample.hidden_TH.dtype == self.dtype
        parts: list[bytes] = [
            np.asarray(sample.prompt_ids, "<i4").tobytes(),
            np.asarray(sample.answer_ids, "<i4").tobytes(),
            sample.hidden_TH.contiguous().view(torch.uint8).numpy().tobytes(),
        ]
        if self.num_top:
            ids_TN, logprobs_TN = sample.top_ids_TN, sample.top_logprobs_TN
            assert ids_TN is not None and logprobs_TN is not None
            assert ids_TN.shape == logprobs_TN.shape == (num_answer, self.num_top)
            parts += [ids_TN.int().numpy().tobytes(), logprobs_TN.float().numpy().tobytes()]
        return parts

    def whole(self, folder: Path) -> Array:
        """The records whose samples all files hold."""
        data = (folder / SAMPLES).read_bytes()
        records = np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)
        prompts_S = np.cumsum(records["num_prompt"], dtype=np.int64)
        answers_S = np.cumsum(records["num_answer"], dtype=np.int64)
        found = [(folder / name).stat().st_size for name in self.files[:-1]]
        count = len(records)
        while count and any(
            size > there
            for size, there in zip(
                self.sizes_of(int(prompts_S[count - 1]), int(answers_S[count - 1])),
                found,
                strict=True,
            )
        ):
            count -= 1
        return records[:count]


def read_about(folder: Path) -> dict[str, Any]:
    """corpus.json. Raises FailedPreconditionError."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
        known = about["format"] == FORMAT and isinstance(about["settings"], dict)
        Form.of(about)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise FailedPreconditionError(
            f"{folder} holds no corpus that this version reads: distil into an empty folder",
            reason=Reason.STORE_FORMAT,
        )
    return dict(about)


def mapped(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A file's first elements as a tensor, read when they are used."""
    size = int(np.prod(shape))
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(shape)


def opened(path: Path) -> int:
    """A descriptor that appends; the file is made if it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def write(handle: int, data: bytes) -> None:
    """Appends all of it. Raises OSError, with a part of it written."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def checksum(record: Array, parts: Iterable[bytes]) -> int:
    """What a record's crc must be. parts: the sample's bytes, by file."""
    crc = zlib.crc32(record.tobytes()[:_BEFORE_CRC])
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc
