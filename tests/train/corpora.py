"""Small corpora that heads can learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorastack.train.corpus import NO_TARGET, Corpus

VOCAB, HIDDEN = 96, 32


class MemoryCorpus(Corpus):
    def __init__(self, answers, states, top=None, settings=None):
        self._answers = [torch.tensor(a) for a in answers]
        self._hidden = torch.cat(states)
        self._tokens = torch.cat(self._answers)
        self._top = top
        self.settings = settings or {}
        self.hidden_size = self._hidden.shape[1]
        self.dtype = self._hidden.dtype
        self.num_top = 0 if top is None else top[0].shape[1]
        self.num_samples = len(answers)
        self.num_tokens = len(self._tokens)
        self.starts = torch.tensor([0, *map(len, answers)]).cumsum(0)

    def split(self, held_out):
        n = 0 if not held_out else max(1, round(held_out * self.num_samples))
        ids = list(range(self.num_samples))
        return ids[n:], ids[:n]

    def positions(self, samples):
        parts = [torch.arange(int(self.starts[i]), int(self.starts[i + 1])) for i in samples]
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts])

    def answers(self, sample):
        return self._answers[sample]

    def tokens(self, positions_P):
        return self._tokens[positions_P]

    def targets(self, positions_P, num_heads):
        ends = self.starts[torch.searchsorted(self.starts, positions_P, right=True)]
        at = positions_P[:, None] + torch.arange(1, num_heads + 1)
        return torch.where(
            at < ends[:, None], self._tokens[at.clamp(max=self.num_tokens - 1)], NO_TARGET
        )

    def hidden(self, positions_P):
        return self._hidden[positions_P]

    def top(self, positions_P):
        return self._top[0][positions_P], self._top[1][positions_P]


def corpus_of(
    folder: Path,
    answers: Sequence[Sequence[int]],
    states: Sequence[Tensor],
    top: tuple[Tensor, Tensor] | None = None,
) -> Corpus:
    return MemoryCorpus(answers, states, top)


def lm_head() -> Tensor:
    """[V, H]: each token's own vector, well apart."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.nn.functional.normalize(torch.randn(VOCAB, HIDDEN, generator=generator), dim=-1) * 4
    )


def counting_corpus(folder: Path, period: int = 7, length: int = 30) -> Corpus:
    """Text that counts 0, 1, ..., period - 1, 0, ...; the state at a token is the vector of the one
    before it, so all that comes is known."""
    lm_head_VH = lm_head()
    answers = [[(start + i) % period for i in range(length)] for start in range(period)]
    states = [lm_head_VH[[(answer[0] - 1) % period, *answer[:-1]]] for answer in answers]
    return corpus_of(folder, answers, states)
