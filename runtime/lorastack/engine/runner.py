"""A batch into tensors, through the model, and back into tokens. Never touches a queue."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor

from lorastack.engine.acceptance import SampledRow, accept_rows
from lorastack.engine.batch import Batch, RowResult, RowStep
from lorastack.engine.proposer import Proposer
from lorastack.engine.stacks import lay_out_loras
from lorastack.errors import InternalError, InvalidArgumentError, LorastackError, Reason
from lorastack.kernels.heads import TopTokens
from lorastack.model.backends.base import Backend
from lorastack.model.context import ForwardBatch, Outputs, RowSpan, SampledTree
from lorastack.model.kv import KVCache, Move
from lorastack.request import Request, TokenLogprobs
from lorastack.sampling.sampler import NO_TOKEN
from lorastack.speculation.accept import Accepted
from lorastack.speculation.proposal import Proposal
from lorastack.speculation.tree import Tree


@dataclass(frozen=True, slots=True)
class StepResults:
    """rows: in the order of the batch's steps. heads_seconds: the part of the step spent on heads.

    failed_heads: digests of heads that gave NaN or infinity. whole: all rows ran at once.
    """

    rows: list[RowResult]
    heads_seconds: float = 0.0
    failed_heads: Sequence[str] = ()
    whole: bool = True


class Runner:
    """Owns the KV cache; borrows the backend and, for a step, adapters."""

    def __init__(self, backend: Backend, kv: KVCache) -> None:
        self._backend = backend
        self._kv = kv
        self._proposer = Proposer(backend)

    @property
    def overlaps(self) -> bool:
        """See `Backend`."""
        return self._backend.overlaps

    def rope_length(self, num_prompt: int) -> int:
        """The prompt's length where dynamic RoPE scales by it, else 0.

        Beside its tokens and LoRAs nothing else shapes a row's KV.
        """
        begin = self._backend.dynamic_rope_begin
        return num_prompt if begin is not None and num_prompt > begin else 0

    def run(self, batch: Batch, meanwhile: Callable[[], None] | None = None) -> StepResults:
        """Runs one step: one forward pass, then the heads of rows that ask for candidates.

        meanwhile: see `Backend.forward`.
        """
        forward, sampled, firsts = self._lay_out(batch)
        outputs = self._backend.forward(forward, self._kv, meanwhile)
        peaks_X = outputs.peaks_X.tolist()
        results = [
            self._score(step, first, outputs, peaks_X) if step.scored else RowResult()
            for step, first in zip(batch.steps, firsts, strict=True)
        ]
        if not sampled:
            return StepResults(results)
        accepted = accept_rows(self._backend.ops, sampled, outputs)
        self._move_kv(sampled, accepted, outputs.moved)
        captured = _captured(sampled, accepted, outputs.hidden_XH)
        last = [
            row.sampled.first_output + (path.path or (0,))[-1]
            for row, path in zip(sampled, accepted, strict=True)
        ]
        began = time.monotonic()
        steps = [row.step for row in sampled]
        drafted = _beside_rows(sampled, outputs.drafted)
        proposals, failed = self._proposer.propose(steps, last, outputs.hidden_XH, drafted)
        seconds = time.monotonic() - began + outputs.heads_seconds
        for row, path, proposal in zip(sampled, accepted, proposals, strict=True):
            scored = results[row.index]
            if scored.error is None:
                result = self._result(row, path, proposal, outputs, peaks_X)
                if (states := captured.get(row.index)) is not None:
                    result = replace(result, states=states[: len(result.tokens)])
                results[row.index] = replace(result, prompt_logprobs=scored.prompt_logprobs)
        return StepResults(results, seconds, failed)

    def _lay_out(self, batch: Batch) -> tuple[ForwardBatch, list[SampledRow], list[int]]:
        """The step for the backend, its rows that sample, and each row's first output.

        Results are wanted of all nodes of a tree, of a chain's last token, and of scored tokens.
        """
        token_ids: list[int] = []
        spans: list[RowSpan] = []
        outputs: list[int] = []
        sampled: list[SampledRow] = []
        firsts: list[int] = []
        for index, step in enumerate(batch.steps):
            start = len(token_ids)
            token_ids.extend(step.token_ids)
            end = len(token_ids)
            parents = step.tree.parents if step.tree else None
            prompt = len(step.request.prompt_ids)
            spans.append(RowSpan(start, end, step.block_table, step.committed, parents, prompt))
            firsts.append(len(outputs))
            outputs.extend(start + place for place in step.scored)
            if step.samples:
                tree = step.tree or Tree.root(step.token_ids[-1])
                params = step.request.sampling
                ask = self._proposer.ask(step)
                drawn = SampledTree(tree, len(outputs), params, step.num_generated, ask)
                sampled.append(SampledRow(index, step, drawn))
                outputs.extend(range(end - tree.num_nodes, end))
        forward = ForwardBatch(
            token_ids,
            tuple(spans),
            outputs,
            lay_out_loras(batch.steps, [len(step.token_ids) for step in batch.steps]),
            [row.sampled for row in sampled if row.by_backend],
        )
        return forward, sampled, firsts

    def _score(
        self, step: RowStep, first: int, outputs: Outputs, peaks_X: list[float]
    ) -> RowResult:
        """The log-probabilities of the prompt tokens behind the scored ones. first: its output."""
        nodes = range(first, first + len(step.scored))
        if not all(math.isfinite(peaks_X[node]) for node in nodes):
            return RowResult(error=_non_finite(step.request))
        start = step.committed + step.scored.start + 1
        ids = step.request.prompt_ids[start : start + len(nodes)]
        num_top = step.request.num_prompt_logprobs or 0
        logprobs = self._backend.ops.logprobs(outputs.logits_XV, nodes, ids, num_top)
        return RowResult(prompt_logprobs=tuple(logprobs))

    def _move_kv(self, sampled: list[SampledRow], accepted: list[Accepted], moved: bool) -> None:
        """Moves the KV of each accepted path behind its root's, in order.

        moved: the backend did so for what it accepted.
        """
        moves = []
        for row, path in zip(sampled, accepted, strict=True):
            places = tuple(range(1, len(path.path) + 1))
            if path.path != places and not (moved and row.by_backend):
                step = row.step
                src = [step.committed + node for node in path.path]
                dst = [step.committed + place for place in places]
                moves.append(Move(step.block_table, src, dst))
        self._kv.move(moves)

    def _result(
        self,
        row: SampledRow,
        accepted: Accepted,
        proposal: Proposal | None,
        outputs: Outputs,
        peaks_X: list[float],
    ) -> RowResult:
        request, places = row.step.request, (0, *accepted.path)
        nodes = [row.sampled.first_output + node for node in places]
        tokens = accepted.tokens
        error: LorastackError | None = None
        for count, (node, token) in enumerate(zip(nodes, tokens, strict=True)):
            if not math.isfinite(peaks_X[node]):
                error = _non_finite(request)
            elif token == NO_TOKEN:
                error = _no_token(row.step)
            if error is not None:
                # What came before is what the row would have without drafts.
                nodes, tokens = nodes[:count], tokens[:count]
                break
        logprobs: list[TokenLogprobs] = []
        if request.num_logprobs is not None:
            ops, num_top = self._backend.ops, request.num_logprobs
            logprobs = ops.logprobs(outputs.logits_XV, nodes, tokens, num_top)
        return RowResult(
            tokens=tokens,
            sources=tuple(row.sampled.tree.sources[node] for node in accepted.path[: len(tokens)]),
            logprobs=tuple(logprobs),
            proposal=proposal,
            error=error,
        )


def _captured(
    rows: Sequence[SampledRow], accepted: Sequence[Accepted], hidden_XH: Tensor
) -> dict[int, Tensor]:
    """The states that predicted each row's tokens, by its step's place in the batch.

    Of rows that capture them. One copy to the host, as hidden_XH holds for this step alone; then
    each row's own, so that none keeps the others' in memory.
    """
    places = {
        row.index: [row.sampled.first_output + node for node in (0, *path.path)]
        for row, path in zip(rows, accepted, strict=True)
        if row.step.request.capture_states
    }
    if not places:
        return {}
    states = hidden_XH[list(chain.from_iterable(places.values()))].cpu()
    parts = states.split_with_sizes([len(own) for own in places.values()])
    return {index: part.clone() for index, part in zip(places, parts, strict=True)}


def _beside_rows(
    rows: Sequence[SampledRow], drafted: Sequence[TopTokens | None]
) -> list[TopTokens | None]:
    """One for each row of what the backend gave for its trees."""
    by_tree = iter(drafted)
    return [next(by_tree, None) if row.by_backend else None for row in rows]


def _non_finite(request: Request) -> InternalError:
    return InternalError(
        f"the model gave non-finite logits with {_loras(request)}; check the adapter's values and "
        "the scale, or use a wider --dtype",
        reason=Reason.NON_FINITE_LOGITS,
    )


def _no_token(step: RowStep) -> InvalidArgumentError:
    """Why the row's processor left no token to draw, although the model's logits are finite."""
    if step.processor is not None and step.processor.error:
        return InvalidArgumentError(
            f"response_format: {step.processor.error}",
            reason=Reason.GRAMMAR_FAILED,
            field="response_format",
        )
    return InvalidArgumentError(
        "no token is left to draw: with the request's response_format, biases and penalties no "
        f"logit of {_loras(step.request)} is finite; choose milder ones",
        reason=Reason.NON_FINITE_LOGITS,
    )


def _loras(request: Request) -> str:
    return ", ".join(use.lora_id for use in request.loras) or "the base model"
