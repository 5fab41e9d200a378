"""Medusa v2 heads and their trainer: r_k = x + SiLU(W_k x + b_k), logits = lm_head(r_k).

The base and its lm_head are frozen; only W and b learn. Recipe: Medusa's v2 trainer (unweighted sum
of the heads' cross entropies, AdamW, lr 1e-3, cosine with warm-up, no weight decay).

Shape suffixes: P positions of a batch, K heads, H hidden, V vocabulary, S sampled vocabulary.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorastack.train.hidden import NO_TARGET, HiddenCorpus

WEIGHTS_FILE = "medusa_lm_head.safetensors"
Path_ = tuple[int, ...]


class MedusaHeads(nn.Module):
    """K residual blocks. Zero weights make every head the identity: it starts as the base."""

    def __init__(self, num_heads: int, hidden_size: int) -> None:
        super().__init__()
        self.weight_KHH = nn.Parameter(torch.zeros(num_heads, hidden_size, hidden_size))
        self.bias_KH = nn.Parameter(torch.zeros(num_heads, hidden_size))

    @property
    def num_heads(self) -> int:
        return self.weight_KHH.shape[0]

    def forward(self, x_PH: Tensor, head: int) -> Tensor:
        """r of one head (0-based), [P, H], in the dtype of x."""
        weight_HH, bias_H = self.weight_KHH[head].to(x_PH.dtype), self.bias_KH[head].to(x_PH.dtype)
        return x_PH + nn.functional.silu(nn.functional.linear(x_PH, weight_HH, bias_H))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    epochs: int = 6
    batch_size: int = 2048
    learning_rate: float = 1e-3
    warmup: float = 0.1  # share of the steps
    max_targets: int = 6144  # most frequent tokens that are taught; rarer ones are hardly guessed
    num_negatives: int = 1024  # other tokens that join the softmax of a step
    seed: int = 0


class _SampledVocabulary:
    """The corpus' most frequent tokens, always, and a few others, drawn anew each step.

    The others stand for all that were not drawn, so log(others / drawn) is added to their logits:
    the partition function stays right in expectation and the softmax costs S, not V.
    """

    def __init__(self, targets_TK: Tensor, lm_head_VH: Tensor, options: TrainOptions) -> None:
        size = lm_head_VH.shape[0]
        count_V = torch.bincount(targets_TK[targets_TK != NO_TARGET], minlength=size)
        frequent_V = count_V.argsort(descending=True)[: options.max_targets]
        inside_V = torch.zeros(size, dtype=torch.bool)
        inside_V[frequent_V] = count_V[frequent_V] > 0
        self._own_S = inside_V.nonzero()[:, 0]
        self._others_S = (~inside_V).nonzero()[:, 0]
        self._drawn = min(options.num_negatives, len(self._others_S))
        self._lm_head_VH = lm_head_VH
        self._column_V = torch.full((size,), NO_TARGET)
        self._column_V[self._own_S] = torch.arange(len(self._own_S))
        self._correction_S = torch.zeros(len(self._own_S) + self._drawn)
        if self._drawn:
            self._correction_S[len(self._own_S) :] = math.log(len(self._others_S) / self._drawn)

    def columns(self, targets_P: Tensor) -> Tensor:
        """Column of each target among the rows that `draw` gives, or NO_TARGET, [P]."""
        return self._column_V[targets_P.clamp(min=0)].masked_fill(targets_P == NO_TARGET, NO_TARGET)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(lm_head rows [S, H], corrections [S]) of one step."""
        picked = torch.randint(max(1, len(self._others_S)), (self._drawn,), generator=generator)
        ids_S = torch.cat([self._own_S, self._others_S[picked]])
        return self._lm_head_VH[ids_S], self._correction_S


def loss_and_gradient(
    r_PH: Tensor, rows_SH: Tensor, correction_S: Tensor, columns_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in float32 and its gradient by r, [P, H].

    By hand and in place, so that one head's logits are the largest thing alive.
    """
    logits_PS = (r_PH @ rows_SH.T).float().add_(correction_S)
    norm_P1 = logits_PS.logsumexp(-1, keepdim=True)
    loss = (norm_P1[:, 0] - logits_PS.gather(1, columns_P[:, None])[:, 0]).mean()
    probs_PS = logits_PS.sub_(norm_P1).exp_()
    probs_PS.scatter_add_(1, columns_P[:, None], -torch.ones_like(norm_P1))
    return loss, (probs_PS.to(r_PH.dtype) @ rows_SH) / len(columns_P)


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(count, generator=generator)
    for begin in range(0, count, size):
        yield order[begin : begin + size]


def train_heads(
    heads: MedusaHeads,
    corpus: HiddenCorpus,
    lm_head_VH: Tensor,
    options: TrainOptions,
    progress: Callable[[str], None] = lambda _: None,
) -> None:
    """Train in place. Matrix products run in the dtype of the states, the loss in float32."""
    generator = torch.Generator().manual_seed(options.seed)
    vocabulary = _SampledVocabulary(
        corpus.targets_TK, lm_head_VH.to(corpus.hidden_TH.dtype), options
    )
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    steps = options.epochs * math.ceil(len(corpus.hidden_TH) / options.batch_size)
    warmup = max(1, int(options.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
        ),
    )
    for epoch in range(options.epochs):
        total_K, num_batches = torch.zeros(heads.num_heads), 0
        for picked in _batches(len(corpus.hidden_TH), options.batch_size, generator):
            rows_SH, correction_S = vocabulary.draw(generator)
            x_PH, targets_PK = corpus.hidden_TH[picked], corpus.targets_TK[picked]
            for head in range(heads.num_heads):
                columns_P = vocabulary.columns(targets_PK[:, head])
                valid_P = columns_P != NO_TARGET
                if not valid_P.any():
                    continue
                r_PH = heads(x_PH[valid_P], head)
                loss, gradient_PH = loss_and_gradient(
                    r_PH.detach(), rows_SH, correction_S, columns_P[valid_P]
                )
                r_PH.backward(gradient_PH)
                total_K[head] += loss
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            num_batches += 1
            if num_batches % 50 == 0:
                progress(f"epoch {epoch + 1} batch {num_batches} {_shown(total_K / num_batches)}")
        progress(f"epoch {epoch + 1}/{options.epochs} loss by head {_shown(total_K / num_batches)}")


def _shown(loss_K: Tensor) -> str:
    return " ".join(f"{loss:.3f}" for loss in loss_K.tolist())


def save_heads(
    folder: Path, heads: MedusaHeads, base_model: str, choices: Sequence[Path_] = ()
) -> None:
    """Write the published v2 layout, weights in bfloat16; `medusa_choices` is our extra field."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for head in range(heads.num_heads):
        weight_HH, bias_H = heads.weight_KHH[head].detach(), heads.bias_KH[head].detach()
        tensors[f"{head}.0.linear.weight"] = weight_HH.bfloat16().contiguous()
        tensors[f"{head}.0.linear.bias"] = bias_H.bfloat16().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config: dict[str, object] = {
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": 1,
        "base_model_name_or_path": base_model,
        "version": "2",
    }
    if choices:
        config["medusa_choices"] = [list(path) for path in choices]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_heads(folder: Path) -> tuple[MedusaHeads, list[Path_]]:
    """Heads in float32 and their choices, [] if the folder names none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS_FILE)
    heads = MedusaHeads(int(config["medusa_num_heads"]), tensors["0.0.linear.bias"].shape[0])
    with torch.no_grad():
        for head in range(heads.num_heads):
            heads.weight_KHH[head] = tensors[f"{head}.0.linear.weight"].float()
            heads.bias_KH[head] = tensors[f"{head}.0.linear.bias"].float()
    return heads, [tuple(path) for path in config.get("medusa_choices", [])]
