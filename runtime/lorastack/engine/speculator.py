"""Decides each row's tree and which rows' heads run, and learns from what is sampled.

Trees never change a token, so nothing that is decided or learnt here changes more than speed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lorastack.engine.batch import RowResult
from lorastack.engine.costs import Costs
from lorastack.engine.row import Row
from lorastack.speculation.budget import allot, pays
from lorastack.speculation.calibration import Calibration
from lorastack.speculation.candidates import Candidates, Chain, forced, looked_up
from lorastack.speculation.lookup import NOWHERE, Continuation
from lorastack.speculation.proposal import Proposal
from lorastack.speculation.tree import Tree

MAX_CHAIN = 16  # tokens of a chain from prompt lookup or a grammar
# Every so many steps, heads run and trees are verified although they do not pay: what is known of
# their worth and cost may be wrong, or have changed.
PROBE_STEPS = 32
MAX_PAUSE = 16  # steps in a row without trees, once none has paid for long
WITHOUT_HEADS = ""  # the key, in place of a heads digest, of what rows without heads teach

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What a step's samples are to be compared with."""

    row: Row
    proposal: Proposal | None
    continuation: Continuation
    tokens: Sequence[int]


class Speculator:
    """Step thread only. calibrations: by heads digest or WITHOUT_HEADS; grows as heads are used."""

    def __init__(
        self,
        costs: Costs,
        max_nodes: int,
        max_step_tokens: int,
        calibrations: dict[str, Calibration],
    ) -> None:
        """max_nodes: for rows whose requests set none. max_step_tokens: of all rows together."""
        self.calibrations = calibrations
        self._lessons: list[_Lesson] = []  # not learnt yet
        self._changed: set[str] = set()  # keys of what has learnt since `take_learned`
        self._costs = costs
        self._max_nodes = max_nodes
        self._max_step_tokens = max_step_tokens
        self._num_steps = 0
        self._pause = self._pause_left = 0  # steps without trees, see `trees`
        self._idle: set[Row] = set()  # rows whose heads do not run in this step
        self._dull: set[str] = set()  # digests of heads that run for no row

    def max_nodes(self, row: Row) -> int:
        """Nodes that the row's tree may have beside its root; 0: its request turns drafting off."""
        speculation = row.request.speculation
        if not speculation.enabled:
            return 0
        return self._max_nodes if speculation.max_nodes is None else speculation.max_nodes

    def choose_heads(self, rows: Sequence[Row]) -> None:
        """Decide which of the decoding rows' heads run in the step at hand: those that pay."""
        drafting = [row for row in rows if self._has_heads(row)]
        known = [self._calibration(row) for row in drafting]
        worths = [calibration.mean_worths for calibration in known]
        room = self._room(len(rows))
        paying = pays(worths, len(rows), len(rows), self._costs.step, self._costs.heads, room)
        self._idle = {
            row
            for row, calibration, pay in zip(drafting, known, paying, strict=True)
            if not pay and calibration.familiar
        }
        self._dull = {_digest(row) for row in self._idle}
        self._dull -= {_digest(row) for row in drafting if row not in self._idle}
        self._num_steps += 1
        if self._idle and self._num_steps % PROBE_STEPS == 0:
            self._idle.remove(next(row for row in drafting if row in self._idle))

    def wants_heads(self, row: Row) -> bool:
        """True if the row's heads shall run in this step.

        With two tokens left they no longer pay: this step makes one, the next makes the other.
        """
        if not self._has_heads(row) or row.num_left <= 2 or row in self._idle:
            return False
        return row.num_generated > 0 or _digest(row) not in self._dull

    def trees(self, rows: Sequence[Row], fixed_tokens: int, num_samples: int) -> list[Tree | None]:
        """The trees of rows that decode; None: the row brings its last token alone.

        fixed_tokens: the step's tokens without trees. num_samples: its rows that make a token.

        While no tree pays, looking for candidates is wasted time: it is left out for one step,
        three, seven and so on, but for rows whose heads ran. A row whose candidates raise goes on
        without a tree, or with one of the nodes before that.
        """
        paused = self._pause_left > 0
        self._pause_left -= paused
        by_row: dict[Row, Candidates] = {}
        for row in rows:
            with advisory(row):
                if (candidates := self._candidates(row, paused)) is not None:
                    by_row[row] = candidates
        if not by_row:
            return [None] * len(rows)
        drafting = by_row.values()
        worths = [_worths(row, candidates) for row, candidates in by_row.items()]
        room = self._room(fixed_tokens)
        allotted = allot(worths, fixed_tokens, num_samples, self._costs.step, room)
        self._pause = 0 if any(allotted) else min(2 * self._pause + 1, MAX_PAUSE)
        self._pause_left = self._pause
        if self._pause and self._num_steps % PROBE_STEPS == 0 and len(drafting) <= room:
            allotted = [min(len(candidates.nodes), 1) for candidates in drafting]
        trees: dict[Row, Tree] = {}
        for (row, candidates), num_nodes in zip(by_row.items(), allotted, strict=True):
            with advisory(row):
                if num_nodes:
                    trees[row] = candidates.tree(row.tokens[-1], num_nodes)
                if row.proposal is not None:
                    self._calibration(row).record_worths(node.worth for node in candidates.nodes)
        return [trees.get(row) for row in rows]

    def note(self, row: Row, result: RowResult) -> None:
        """Keep the step's samples, beside what the row's heads and lookup said, for `learn`."""
        if row.proposal is not None or row.continuation.tokens:
            lesson = _Lesson(row, row.proposal, row.continuation, result.tokens)
            self._lessons.append(lesson)

    def learn(self) -> None:
        """Compare what was noted. The next trees may be made before: they know a step less then."""
        lessons, self._lessons = self._lessons, []
        for lesson in lessons:
            with advisory(lesson.row):
                self._learn(lesson)

    def take_learned(self) -> dict[str, Calibration]:
        """Copies of the calibrations that learnt something since the last call."""
        self.learn()
        changed, self._changed = self._changed, set()
        return {digest: self.calibrations[digest].copy() for digest in changed}

    def forget(self, digest: str) -> None:
        """No row will use these heads again."""
        self.learn()  # or a lesson that is left would bring them back
        self.calibrations.pop(digest, None)
        self._changed.discard(digest)

    def _learn(self, lesson: _Lesson) -> None:
        calibration = self._calibration(lesson.row)
        if lesson.proposal is not None:
            calibration.record_proposal(lesson.proposal, lesson.tokens)
        if lesson.continuation.tokens:
            calibration.record_lookup(*lesson.continuation, lesson.tokens)
        self._changed.add(_digest(lesson.row))

    def _candidates(self, row: Row, paused: bool) -> Candidates | None:
        """None: nothing may be drafted, or nothing is proposed. paused: only if its heads ran."""
        row.continuation = NOWHERE
        max_nodes, max_depth = self.max_nodes(row), row.num_left - 1
        if not max_nodes or max_depth < 1 or (paused and row.proposal is None):
            return None
        calibration = self._calibration(row)
        limit = min(max_depth, MAX_CHAIN)
        chains: list[Chain] = []
        if row.matcher is not None and (tokens := row.matcher.forced(limit)):
            chains.append(forced(tokens))
        row.continuation = row.look_up(limit)
        if row.continuation.tokens:
            chains.append(looked_up(row.continuation, calibration))
        if row.proposal is None and not chains:
            return None
        return Candidates(
            row.proposal, chains, calibration, max_nodes=max_nodes, max_depth=max_depth
        )

    def _room(self, fixed_tokens: int) -> int:
        """Nodes that fit a step of `fixed_tokens` other tokens."""
        return max(self._max_step_tokens - fixed_tokens, 0)

    def _has_heads(self, row: Row) -> bool:
        return row.request.heads is not None and self.max_nodes(row) > 0

    def _calibration(self, row: Row) -> Calibration:
        """What is known of the row's heads; at first what they say of themselves."""
        digest, heads = _digest(row), row.request.heads
        if digest not in self.calibrations:
            self.calibrations[digest] = Calibration.from_json(heads.prior if heads else "")
        return self.calibrations[digest]


def _digest(row: Row) -> str:
    """The digest of the row's heads, WITHOUT_HEADS without heads."""
    return row.request.heads.digest if row.request.heads else WITHOUT_HEADS


def _worths(row: Row, candidates: Candidates) -> Iterator[float]:
    """`Candidates.worths`; they end where they raise."""
    with advisory(row):
        yield from candidates.worths()


@contextmanager
def advisory(row: Row | None = None) -> Iterator[None]:
    """Drafts never change a token, so a fault in drafting costs speed and nothing else.

    row: the only one that the block drafts for; None: the whole step.
    """
    try:
        yield
    except Exception:
        who = "the step" if row is None else f"request {row.request.request_id}"
        log.exception("drafting failed; %s goes on without", who)
