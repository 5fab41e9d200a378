"""`lorastack serve` whose heads know some answers, more or less.

    python -m tests.integration.mistral_7b.scripted ANSWERS serve ...

ANSWERS: a JSON file, request id -> the tokens that it will come to; read anew in every step. Where
a row's id is in it, its heads propose guesses, of which about half are accepted: random heads'
never are. Which ones are right depends on the id and the place alone, and drafts cost nothing here,
so that the machine hardly decides what is accepted. Verification, and whatever makes tokens, is
real.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lorastack.cli.main import main
from lorastack.engine import runner
from lorastack.engine.batch import RowStep
from lorastack.engine.proposer import Proposer
from lorastack.kernels.heads import TopTokens
from lorastack.speculation.proposal import Proposal
from lorastack.startup import engine as startup_engine
from tests.helpers.costs import CheapHeads
from tests.helpers.scripted import guessed_places

RIGHT = 0.65  # of three guesses (1 + RIGHT + RIGHT**2) * RIGHT = 1.35 are accepted then


class KnowingProposer(Proposer):
    """In the place of `Proposer`. The heads run all the same."""

    path: Path

    def propose(
        self,
        steps: Sequence[RowStep],
        last: Sequence[int],
        hidden_XH: torch.Tensor,
        drafted: Sequence[TopTokens | None] = (),
    ) -> tuple[list[Proposal | None], list[str]]:
        """See `Proposer.propose`."""
        answers: dict[str, list[int]] = json.loads(self.path.read_text())
        drafts, failed = super().propose(steps, last, hidden_XH, drafted)
        for row, (step, place) in enumerate(zip(steps, guessed_places(steps, last), strict=True)):
            name, own = step.request.request_id, drafts[row]
            if name in answers and own is not None:
                following = answers[name][place : place + len(own.ids)]
                drafts[row] = guessed(following, random.Random(f"{name} {place}"))
        return drafts, failed


def guessed(following: Sequence[int], chance: random.Random) -> Proposal:
    """One candidate for each of the tokens; where all before it were right, it mostly is, too."""
    ids = [(token if chance.random() < RIGHT else token ^ 1,) for token in following]
    return Proposal(tuple(ids), ((math.log(RIGHT),),) * len(ids))


if __name__ == "__main__":
    KnowingProposer.path = Path(sys.argv.pop(1))
    vars(runner)["Proposer"] = KnowingProposer
    vars(startup_engine)["measure"] = lambda *_: CheapHeads()
    main()
