"""Many rows in need of more adapters than fit: the budget holds, and every wait has its bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.memory.turns import QUANTUM
from tests.adapters.pools import Bench, bench
from tests.adapters.test_host import packed
from tests.helpers.streams import FakeDevice

ROUNDING = 1e-9  # of sums of steps
STEP = QUANTUM / 4  # seconds


@dataclass
class Row:
    """Wants to run `left` steps with its LoRAs from `arrival` on."""

    loras: str
    arrival: int
    left: int
    heads: str
    waited_since: float | None = None
    longest_wait: float = 0.0


ROWS = st.lists(
    st.builds(
        Row,
        loras=st.sampled_from(["a", "b", "c", "d", "e", "ab", "cd", "be", "abc", "de", "ade"]),
        arrival=st.integers(0, 12),
        left=st.integers(1, 12),
        heads=st.sampled_from(["", "", "f", "g", "fg", "gh"]),
    ),
    max_size=9,
)


class World:
    """A step loop over a pool: every row that has arrived asks every step, as running rows do."""

    def __init__(self, made: Bench, budget: int, rows: list[Row]) -> None:
        self.made, self.budget, self.rows = made, budget, rows
        self.num_sets = len({row.loras for row in rows})
        self.arrived_at: dict[str, float] = {}
        self.used: set[str] = set()  # by rows that ran in the last step

    def run(self) -> None:
        for number in range(2000):
            if not (rows := [row for row in self.rows if row.left]):
                return
            self.step([row for row in rows if row.arrival <= number])
        raise AssertionError("rows starve")

    def step(self, rows: list[Row]) -> None:
        held = [digest for row in rows for digest in self.run_row(row)]
        assert Counter(self.made.resident) + Counter() == Counter(held)
        self.used = {lora for row in rows if row.waited_since is None for lora in row.loras}
        self.made.pool.release(held)
        self.made.now += STEP
        self.made.settle()
        self.check_evictions()

    def run_row(self, row: Row) -> list[str]:
        now = self.made.now
        if self.made.pool.acquire(row.loras) is None:
            row.waited_since = now if row.waited_since is None else row.waited_since
            row.longest_wait = max(row.longest_wait, now - row.waited_since)
            return []
        row.waited_since = None
        row.left -= 1
        heads = row.heads if row.heads and self.made.pool.try_acquire(row.heads) else ""
        return [*row.loras, *heads]

    def check_evictions(self) -> None:
        """The budget holds, and what was in use and has gone had been there for a turn."""
        stats = self.made.pool.stats()
        copying = self.made.pool._pipeline.copying
        here = {adapter.digest: adapter.nbytes for adapter in stats.adapters}
        assert sum(here.values()) + sum(copying.values()) <= self.budget
        for digest in self.arrived_at.keys() - here:
            arrived = self.arrived_at.pop(digest)
            assert digest not in self.used or self.made.now - arrived >= QUANTUM - ROUNDING
        for digest in here:
            self.arrived_at.setdefault(digest, self.made.now)


@given(rows=ROWS, budget=st.integers(10, 14), slow=st.booleans())
@settings(max_examples=150)
def test_every_set_gets_its_turn_in_time(rows: list[Row], budget: int, slow: bool) -> None:
    """The bound of docs/architecture.md; a load and a copy take a step each here."""
    sizes = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 2, "g": 4, "h": 1}
    device = FakeDevice() if slow else None
    with bench(budget, lambda digest: packed(digest, sizes[digest]), device) as made:
        world = World(made, budget, rows)
        world.run()
        assert not any(made.resident.values())
        bound = STEP + world.num_sets * (QUANTUM + 2 * STEP) + 2 * STEP
        assert max((row.longest_wait for row in rows), default=0.0) <= bound
