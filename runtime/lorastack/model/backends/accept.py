"""Which tokens a step's trees give, by a backend that samples on the host."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorastack.kernels.ops import Ops
from lorastack.model.context import SampledTree
from lorastack.speculation.accept import Accepted, Nodes, accept


def accept_trees(
    ops: Ops, logits_XV: Tensor, best_X: Tensor, trees: Sequence[SampledTree]
) -> list[Accepted]:
    """What each tree gains. logits_XV, best_X: see `Outputs`.

    Goes down all trees level by level, so that only nodes on accepted paths are sampled: a node's
    sample costs up to a millisecond in torch. A backend that samples all nodes at once gives the
    same, since a sample depends on its node alone.
    """
    best = best_X.tolist()

    def sample(nodes: Nodes) -> list[int]:
        samples = [trees[index].sample_at(node, depth) for index, node, depth in nodes]
        return ops.sample(logits_XV, best, samples)

    return accept([each.tree for each in trees], sample)
