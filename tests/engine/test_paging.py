"""Scheduler and pool together: rows on more LoRAs than fit take turns and lose nothing."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.memory.turns import QUANTUM
from lorastack.request import HeadsUse, LoraUse
from tests.adapters.pools import bench
from tests.adapters.test_host import packed
from tests.engine.made_up import NUM_HEADS, World, make_request, make_row, plain

STEP = QUANTUM / 4  # seconds
STACKS = st.sampled_from([(), ("a",), ("b",), ("c",), ("d",), ("a", "b"), ("c", "d")])


def load(digest: str) -> PackedAdapter:
    made = packed(digest, 1)
    if digest != "heads":
        return made
    return replace(made, layout=replace(made.layout, num_heads=NUM_HEADS))


@settings(max_examples=50)
@given(st.lists(st.tuples(STACKS, st.integers(1, 40)), min_size=1, max_size=8), st.integers(1, 8))
def test_rows_that_lost_their_lora_go_on_where_they_were(
    rows: list[tuple[tuple[str, ...], int]], max_rows: int
) -> None:
    """Room for two of four LoRAs. A row that runs is computed once: it keeps its pages."""
    expected = {}
    with bench(2, load) as made:
        world = World(256, pool=made.pool, max_rows=max_rows)
        for index, (stack, max_new) in enumerate(rows):
            loras = tuple(LoraUse(lora_id=digest, digest=digest) for digest in stack)
            heads = HeadsUse(medusa_id="heads", digest="heads")
            request = make_request(
                str(index), [1, 2, 3], max_new, loras=loras, heads=heads, ignore_eos=True
            )
            expected[request.request_id] = plain(request, eos=-1)
            world.scheduler.add(make_row(request))
        computed: dict[str, int] = {}
        for _ in range(2000):
            if not len(world.scheduler.rows):
                break
            world.step()
            for row in world.scheduler.rows.running:
                name = row.request.request_id
                assert row.num_computed >= computed.get(name, 0)
                computed[name] = row.num_computed
            made.now += STEP
            made.settle()
        assert world.tokens == expected
        assert not any(made.resident.values())
        assert world.pages.num_held == 0
