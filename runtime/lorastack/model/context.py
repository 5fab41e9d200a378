"""What one step asks of a backend, and what it gives. Filled by the runner, read by the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lorastack.kernels.attention import RowSpan
from lorastack.kernels.heads import HeadsWeights, TopTokens
from lorastack.kernels.sample import Sample
from lorastack.lora.segments import LoraBatch
from lorastack.request import SamplingParams
from lorastack.speculation.accept import Accepted
from lorastack.speculation.tree import Tree

__all__ = ["ForwardBatch", "HeadsAsk", "Outputs", "RowSpan", "SampledTree"]


@dataclass(frozen=True, slots=True)
class HeadsAsk:
    """What a row asks of heads that choose from outputs of their own: so many tokens a head."""

    heads: HeadsWeights
    num_candidates: int


@dataclass(frozen=True, slots=True)
class SampledTree:
    """A row whose tokens are the model's own, accepted by the match rule (`speculation.accept`).
    Its typical_p, unless it is greedy, is 1: that takes a sorted vocabulary.

    first_output: its root's place in the step's outputs; the other nodes follow in their order.
    token_index: the place in the row's output of the token that is sampled at the root. ask: of
    the row's heads, about what follows its accepted path; a backend may leave it to the engine.
    """

    tree: Tree  # the root alone where nothing is drafted
    first_output: int
    params: SamplingParams
    token_index: int
    ask: HeadsAsk | None = None

    def sample_at(self, node: int, depth: int) -> Sample:
        """The sample at a node behind `depth` accepted ones."""
        return Sample(self.first_output + node, self.params, self.token_index + depth)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step: all that a backend needs for it, in plain values, to be brought to its device once.

    rows: they own the step's tokens in order and without gaps. outputs: tokens whose results are
    wanted, as their places in the step, rising. lora: segments over the step's tokens. trees: rows
    whose tokens the backend samples and accepts itself.
    """

    token_ids: Sequence[int]
    rows: tuple[RowSpan, ...]
    outputs: Sequence[int]
    lora: LoraBatch = field(default_factory=LoraBatch)
    trees: Sequence[SampledTree] = ()


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step gives for each of the X tokens whose results were wanted, and for its trees.

    On the device, for what else is asked of a row: hidden_XH, after the final norm, and logits_XV,
    see `Backend.logits`; they hold until the next step begins. On the host: peaks_X and best_X, the
    best logit and its token, see `kernels.best`, and `accepted`, beside the batch's trees.

    moved: keys and values of accepted paths lie behind their roots' already. drafted: beside the
    trees, what `Ops.propose` gives for a tree's ask, [heads, tokens] on the host, None for trees
    without one; or () where the engine is to ask. heads_seconds: of the step, for that.
    """

    hidden_XH: Tensor
    logits_XV: Tensor
    peaks_X: Tensor
    best_X: Tensor
    accepted: Sequence[Accepted]
    moved: bool = False
    drafted: Sequence[TopTokens | None] = ()
    heads_seconds: float = 0.0
