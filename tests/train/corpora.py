"""Small corpora that heads can learn."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorastack.train.corpus import Corpus, CorpusWriter, Sample

VOCAB, HIDDEN = 96, 32
SETTINGS = {"prompts": "numbers", "seed": 7}


def corpus_of(
    folder: Path,
    answers: Sequence[Sequence[int]],
    states: Sequence[Tensor],
    top: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> Corpus:
    """A new corpus within the folder. Prompts are held out from the first on.

    states: [T, H] an answer; top: ([T, N], [T, N]) an answer.
    """
    place = folder / uuid.uuid4().hex
    num_top = 0 if top is None else top[0][0].shape[1]
    with CorpusWriter(
        place,
        settings=SETTINGS,
        hidden_size=states[0].shape[1],
        dtype=states[0].dtype,
        num_top=num_top,
    ) as writer:
        for number, (answer, hidden_TH) in enumerate(zip(answers, states, strict=True)):
            ids_TN, logprobs_TN = (None, None) if top is None else top[number]
            writer.append(
                Sample(
                    number=number,
                    prompt_key=(number << 64) // len(answers),
                    prompt_ids=[number],
                    answer_ids=answer,
                    hidden_TH=hidden_TH,
                    top_ids_TN=ids_TN,
                    top_logprobs_TN=logprobs_TN,
                )
            )
    return Corpus.open(place)


def lm_head() -> Tensor:
    """[V, H]: each token's own vector, well apart."""
    generator = torch.Generator().manual_seed(0)
    rows_VH = torch.randn(VOCAB, HIDDEN, generator=generator)
    return torch.nn.functional.normalize(rows_VH, dim=-1) * 4


def counting_corpus(folder: Path, period: int = 7, length: int = 30) -> Corpus:
    """Text that counts 0, 1, ..., period - 1, 0, ...; the state at a token is the vector of the one
    before it, so all that comes is known."""
    lm_head_VH = lm_head()
    answers = [[(start + i) % period for i in range(length)] for start in range(period)]
    states = [lm_head_VH[[(answer[0] - 1) % period, *answer[:-1]]] for answer in answers]
    return corpus_of(folder, answers, states)
