"""Final-norm hidden states of a corpus, computed once: the frozen base is not run again.

Shape suffixes: T answer positions of all samples, one after the other, K heads, H hidden, B rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorastack.train.distill import Sample

NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class HiddenCorpus:
    """What heads are trained and measured on.

    A position is a token after which the base spoke: the last prompt token and every answer token
    but the last. Samples lie one after the other; sample i owns positions starts[i]:starts[i + 1].
    """

    hidden_TH: Tensor
    targets_TK: Tensor  # column k - 1: the token head k must guess there, or NO_TARGET
    starts: list[int]

    @property
    def num_samples(self) -> int:
        return len(self.starts) - 1


def targets_of(answer_ids: Sequence[int], num_heads: int) -> Tensor:
    """[len(answer), K]: head k, at the position that emits answer[i], guesses answer[i + k].

    lm_head at that position already gives answer[i] (t + 1), so head 1 gives the token after it.
    """
    length = len(answer_ids)
    padded = torch.tensor(list(answer_ids) + [NO_TARGET] * num_heads)
    return torch.stack([padded[k : k + length] for k in range(1, num_heads + 1)], dim=1)


@torch.inference_mode()
def hidden_corpus(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    num_heads: int,
    batch_tokens: int = 8192,
    progress: Callable[[str], None] = lambda _: None,
) -> HiddenCorpus:
    """Run the base's body once over every sample; states keep the model's dtype."""
    order = sorted(range(len(samples)), key=lambda i: _length(samples[i]), reverse=True)
    parts: list[Tensor] = [torch.empty(0)] * len(samples)
    done = 0
    while done < len(order):
        rows = max(1, batch_tokens // _length(samples[order[done]]))
        batch = order[done : done + rows]
        for index, part in zip(batch, _states(model, [samples[i] for i in batch]), strict=True):
            parts[index] = part
        done += len(batch)
        progress(f"{done}/{len(order)} samples")
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.shape[0])
    targets_TK = torch.cat([targets_of(sample.answer_ids, num_heads) for sample in samples])
    return HiddenCorpus(torch.cat(parts), targets_TK, starts)


def _length(sample: Sample) -> int:
    return len(sample.prompt_ids) + len(sample.answer_ids)


def _states(model: PreTrainedModel, samples: Sequence[Sample]) -> list[Tensor]:
    """Per sample [len(answer), H]. Right padding needs no mask: attention is causal."""
    width = max(map(_length, samples))
    ids_BT = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids = sample.prompt_ids + sample.answer_ids
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    hidden_BTH = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    found = []
    for row, sample in enumerate(samples):
        first = len(sample.prompt_ids) - 1
        found.append(hidden_BTH[row, first : first + len(sample.answer_ids)].clone())
    return found
