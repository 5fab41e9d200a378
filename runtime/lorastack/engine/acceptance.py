"""Which tokens a step's rows take, by each row's own rule.

The backend samples and accepts for rows that take the model's own tokens by the match rule. The
rest happens here, on the host: rows with a processor, typical acceptance, and typical_p, which not
every backend's kernels have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorastack.engine.batch import RowStep
from lorastack.kernels.ops import Ops
from lorastack.model.context import Outputs, SampledTree
from lorastack.sampling.sampler import posterior, sample
from lorastack.speculation.accept import Accepted, Nodes, accept, accept_typical


@dataclass(frozen=True, slots=True)
class SampledRow:
    """A row that samples tokens. index: of its step in the batch."""

    index: int
    step: RowStep
    sampled: SampledTree

    @property
    def by_backend(self) -> bool:
        """True if the backend accepts its tokens."""
        request = self.step.request
        own = self.step.processor is None and request.sampling.typical_p >= 1
        return own and request.typical is None


def accept_rows(ops: Ops, rows: Sequence[SampledRow], outputs: Outputs) -> list[Accepted]:
    """What each row gains. outputs: the step's, of these rows."""
    by_backend = iter(outputs.accepted)
    accepted = {row.index: next(by_backend) for row in rows if row.by_backend}
    on_host = [row for row in rows if not row.by_backend]
    if on_host:
        accepted |= _accept_on_host(ops, on_host, outputs)
    return [accepted[row.index] for row in rows]


def _accept_on_host(ops: Ops, rows: Sequence[SampledRow], outputs: Outputs) -> dict[int, Accepted]:
    """What each row gains, by its step's place in the batch."""
    accepted: dict[int, Accepted] = {}
    best_X = outputs.best_X.tolist()
    exact = [row for row in rows if row.step.request.typical is None]
    nodes = _Nodes(ops, exact, outputs.logits_XV, best_X)
    for row, gain in zip(
        exact, accept([row.sampled.tree for row in exact], nodes.sample), strict=True
    ):
        accepted[row.index] = gain
    rules = [(row, rule) for row in rows if (rule := row.step.request.typical) is not None]
    if rules:
        nodes = _Nodes(ops, [row for row, _ in rules], outputs.logits_XV, best_X)
        trees, wanted = [row.sampled.tree for row, _ in rules], [rule for _, rule in rules]
        typical = accept_typical(trees, wanted, nodes.look, nodes.sample)
        for (row, _), gain in zip(rules, typical, strict=True):
            accepted[row.index] = gain
    return accepted


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of some rows' trees, by what the model says there."""

    ops: Ops
    rows: Sequence[SampledRow]
    logits_XV: Tensor
    best_X: Sequence[int]

    def sample(self, nodes: Nodes) -> list[int]:
        """A token for each node, NO_TOKEN where none is left."""
        samples, processed = [], []
        for index, node, depth in nodes:
            row = self.rows[index]
            samples.append(row.sampled.sample_at(node, depth))
            processed.append(self._processed(row, node))
        return sample(self.ops, self.logits_XV, self.best_X, samples, processed)

    def look(self, nodes: Nodes) -> list[tuple[float, list[float]]]:
        """The entropy at each node, and the probabilities of its children's tokens."""
        posteriors = []
        for index, node, _ in nodes:
            row = self.rows[index]
            logits_V = self._processed(row, node)
            if logits_V is None:
                logits_V = self.logits_XV[row.sampled.first_output + node]
            tree = row.sampled.tree
            tokens = [tree.tokens[child] for child in tree.children[node]]
            posteriors.append(posterior(logits_V, row.sampled.params.temperature, tokens))
        return posteriors

    def _processed(self, row: SampledRow, node: int) -> Tensor | None:
        """What the row's processor makes of the node's logits; None without a processor."""
        if row.step.processor is None:
            return None
        logits_V = self.logits_XV[row.sampled.first_output + node]
        return row.step.processor.apply(logits_V, row.sampled.tree.path_to(node))
