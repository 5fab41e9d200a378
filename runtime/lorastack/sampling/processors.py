"""What a request makes of the model's logits before temperature and filters.

The order is vLLM's. The grammar forbids tokens (-inf). logit_bias is added. repetition_penalty
divides positive logits of tokens of prompt and output and multiplies their negative ones.
frequency_penalty (times the number of uses) and presence_penalty are taken from tokens of the
output. All of it depends on the row's own tokens up to the logits' position, so that a node of a
tree sees what plain generation would see there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lorastack.request import Grammar, Matcher, SamplingParams


def needs_processor(params: SamplingParams, grammar: Grammar | None) -> bool:
    """True if a row's tokens do not come from the model's own logits."""
    return grammar is not None or bool(params.logit_bias) or _penalises(params)


class Processor:
    """Changes one row's logits. Counts the row's tokens, and keeps its place in its grammar."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], matcher: Matcher | None
    ) -> None:
        """matcher: fresh, and from now on this processor's to commit to."""
        self._params = params
        self._matcher = matcher
        self._bias_ids = torch.tensor([token for token, _ in params.logit_bias])
        self._biases = torch.tensor([bias for _, bias in params.logit_bias], dtype=torch.float64)
        repeats = params.repetition_penalty != 1.0
        self._tally = _Tally(prompt_ids if repeats else ()) if _penalises(params) else None

    def apply(self, logits_V: Tensor, path: Sequence[int]) -> Tensor:
        """New logits, from which the token behind the row's tokens and `path` is drawn.

        logits_V: the model's there, float32 or float64. path: tokens accepted in this step before
        it, all of them possible; calls may come with any path in any order.
        """
        logits_V = logits_V.clone()
        if self._matcher is not None:
            self._matcher.seek(path)
            logits_V.masked_fill_(~_unpack(self._matcher.mask(), logits_V), -torch.inf)
        if self._params.logit_bias:
            ids, biases = self._bias_ids.to(logits_V.device), self._biases.to(logits_V)
            logits_V.index_add_(0, ids, biases)
        if self._tally is not None:
            self._tally.push(path)
            try:
                self._penalise(logits_V, self._tally)
            finally:
                self._tally.pop(path)
        return logits_V

    @property
    def error(self) -> str:
        """Why the row's grammar was given up, which leaves no token; else ""."""
        return "" if self._matcher is None else self._matcher.error

    def commit(self, tokens: Sequence[int]) -> None:
        """Adds these tokens to the row."""
        if self._matcher is not None:
            self._matcher.commit(tokens)
        if self._tally is not None:
            self._tally.push(tokens)

    def _penalise(self, logits_V: Tensor, tally: _Tally) -> None:
        params, ids = self._params, tally.ids.to(logits_V.device)
        values, counts = logits_V[ids], tally.counts.to(logits_V)
        penalty = params.repetition_penalty
        if penalty != 1.0:
            values = torch.where(values > 0, values / penalty, values * penalty)
        values -= params.frequency_penalty * counts
        values -= params.presence_penalty * (counts > 0)
        logits_V[ids] = values


class _Tally:
    """Distinct tokens and their counts in the output, in arrays that grow in place."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        """prompt_ids: listed from the start, with count 0 until the output holds them too."""
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        self._num_prompt = len(self._places)
        # Ids and counts; zeros behind the last place.
        self._table = np.zeros((2, self._num_prompt + 64), np.int64)
        self._table[0, : self._num_prompt] = list(self._places)

    @property
    def ids(self) -> Tensor:
        """int64; a view, valid until the next push."""
        return torch.from_numpy(self._table[0, : len(self._places)])

    @property
    def counts(self) -> Tensor:
        """int64, beside `ids`."""
        return torch.from_numpy(self._table[1, : len(self._places)])

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            place = self._places.setdefault(token, len(self._places))
            if place == self._table.shape[1]:
                self._table = np.pad(self._table, ((0, 0), (0, place)))
            self._table[0, place] = token
            self._table[1, place] += 1

    def pop(self, tokens: Sequence[int]) -> None:
        """Undoes the last push, which was of these tokens."""
        for token in reversed(tokens):
            place = self._places[token]
            self._table[1, place] -= 1
            if self._table[1, place] == 0 and place >= self._num_prompt:
                del self._places[token]  # pushed last, so that no place is behind its own


def _penalises(params: SamplingParams) -> bool:
    penalties = (params.frequency_penalty, params.presence_penalty)
    return params.repetition_penalty != 1.0 or penalties != (0.0, 0.0)


def _unpack(mask: bytes, like_V: Tensor) -> Tensor:
    """A matcher's mask as bool, one for each of `like_V`, on its device."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(like_V), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).to(like_V.device)
