"""`lorastack serve` whose heads know some answers, more or less.

    python -m tests.integration.mistral_7b.scripted ANSWERS serve ...

ANSWERS: a JSON file, request id -> the tokens that it will come to; read anew in every step. Where
a row's id is in it, what its heads proposed is replaced by a `ScriptedDrafter`'s guesses, which are
right about half the time: random heads never are. Drafts cost nothing here, so that what is drafted
does not depend on the machine. Verification, and whatever makes tokens, is real.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lorastack.cli.main import main
from lorastack.engine import loading, runner
from lorastack.engine.batch import Draft, RowStep
from lorastack.engine.drafts import Drafter
from lorastack.engine.stacks import Stacks
from lorastack.model.decoder import Decoder
from tests.helpers.costs import CheapDrafts
from tests.helpers.scripted import Clock, Script, ScriptedDrafter


class KnowingDrafter(Drafter):
    """In the place of `Drafter`. The heads run all the same."""

    path: Path

    def __init__(self, decoder: Decoder, stacks: Stacks) -> None:
        super().__init__(decoder, stacks)
        self._answers: dict[str, list[int]] = {}
        script = Script(num_pages=0, answers=self._answers)
        self._scripted = ScriptedDrafter(decoder, script, random.Random(7), Clock())

    def draft(
        self, steps: Sequence[RowStep], last: Sequence[int], hidden_XH: torch.Tensor
    ) -> list[Draft | None]:
        """As `Drafter.draft`."""
        self._answers.update(json.loads(self.path.read_text()))
        own = super().draft(steps, last, hidden_XH)
        guessed = self._scripted.draft(steps, last, hidden_XH)
        return [
            guess if step.request.request_id in self._answers else mine
            for step, mine, guess in zip(steps, own, guessed, strict=True)
        ]


if __name__ == "__main__":
    KnowingDrafter.path = Path(sys.argv.pop(1))
    vars(runner)["Drafter"] = KnowingDrafter
    vars(loading)["measure"] = lambda *_: CheapDrafts()
    main()
