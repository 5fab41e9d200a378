"""Which tokens a step's rows take: draws at nodes of their trees, by each row's own rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorastack.engine.batch import RowStep
from lorastack.kernels.sample import Sample
from lorastack.sampling.sampler import posterior, sample
from lorastack.speculation.accept import Accepted, Nodes, accept, accept_typical
from lorastack.speculation.tree import Tree


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row that draws tokens. first_logit: its root's row in the step's logits."""

    index: int  # of its step in the batch
    step: RowStep
    tree: Tree  # the root alone where nothing is drafted
    first_logit: int


def accept_rows(
    rows: Sequence[SampledRow], logits_XV: Tensor, best_X: Sequence[int]
) -> list[Accepted]:
    """What each row gains. logits_XV, best_X: the step's, see `Outputs`."""
    accepted: dict[int, Accepted] = {}
    exact = [row for row in rows if row.step.request.typical is None]
    nodes = _Nodes(exact, logits_XV, best_X)
    for row, found in zip(exact, accept([r.tree for r in exact], nodes.sample), strict=True):
        accepted[row.index] = found
    rules = [(row, rule) for row in rows if (rule := row.step.request.typical) is not None]
    if rules:
        nodes = _Nodes([row for row, _ in rules], logits_XV, best_X)
        trees, wanted = [row.tree for row, _ in rules], [rule for _, rule in rules]
        typical = accept_typical(trees, wanted, nodes.look, nodes.sample)
        for (row, _), found in zip(rules, typical, strict=True):
            accepted[row.index] = found
    return [accepted[row.index] for row in rows]


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of some rows' trees, by what the model says there."""

    rows: Sequence[SampledRow]
    logits_XV: Tensor
    best_X: Sequence[int]

    def sample(self, nodes: Nodes) -> list[int]:
        samples, processed = [], []
        for index, node, depth in nodes:
            row = self.rows[index]
            place, token_index = row.first_logit + node, row.step.num_generated + depth
            samples.append(Sample(place, row.step.request.sampling, token_index))
            processed.append(self._processed(row, node))
        return sample(self.logits_XV, self.best_X, samples, processed)

    def look(self, nodes: Nodes) -> list[tuple[float, list[float]]]:
        """Entropy at each node, and the chances of its children's tokens."""
        found = []
        for index, node, _ in nodes:
            row = self.rows[index]
            logits_V = self._processed(row, node)
            if logits_V is None:
                logits_V = self.logits_XV[row.first_logit + node]
            tokens = [row.tree.tokens[child] for child in row.tree.children[node]]
            found.append(posterior(logits_V, row.step.request.sampling.temperature, tokens))
        return found

    def _processed(self, row: SampledRow, node: int) -> Tensor | None:
        """None: the row takes the model's own logits."""
        if row.step.processor is None:
            return None
        logits_V = self.logits_XV[row.first_logit + node]
        return row.step.processor.apply(logits_V, row.tree.path_to(node))
