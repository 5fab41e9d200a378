"""Best tokens and draws, against the references."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.kernels.sample import Sample
from lorastack.kernels.triton.samples import Nodes, Sampled, num_spans, sample, settings_of


def run(logits_XV: Tensor, samples: Sequence[Sample], device: torch.device) -> Sampled:
    X = len(logits_XV)
    trees = {each.row: i for i, each in enumerate(samples)}
    ints = dict(dtype=torch.int32, device=device)
    nodes = Nodes(
        torch.tensor([trees.get(x, -1) for x in range(X)], **ints),
        torch.zeros(X, **ints),
        torch.tensor(
            [settings_of(s.params, s.token_index) for s in samples] or [[0] * 6], device=device
        ),
        torch.tensor([X], **ints),
    )
    out = Sampled(torch.zeros(X, device=device), torch.zeros(X, **ints), torch.zeros(X, **ints))
    keys = torch.zeros(X, num_spans(logits_XV.shape[1]), dtype=torch.int64, device=device)
    sample(logits_XV.to(device), nodes, keys, out, X + 1)
    return out
