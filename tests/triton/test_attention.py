"""Paged tree attention: right, and every token with the bits that it has alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lorastack.kernels.attention import RowSpan, attend_reference
from lorastack.kernels.triton.attention import AttentionWorkspace, attend
from lorastack.kernels.triton.attention_plan import AttentionArrays, AttentionShape, plan_attention

PAGE, MAX_PARTS, POISON = 4, 24, -(1 << 20)
# Blocks and splits are small, so that few keys fill several.
WIDE = AttentionShape(6, 2, 10, PAGE, None, block=16, split=32)  # a share that fills no tile
WINDOWED = AttentionShape(1, 1, 8, PAGE, 9, block=16, split=16)  # a token a row of a tile
TREE = (-1, 0, 0, 1, 3)


class Cache:
    """One layer's pages. Slots that no row has filled are NaN."""

    def __init__(self, shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
        size = (48, 2, shape.num_kv_heads, PAGE, shape.head_dim)
        self.data = torch.full(size, torch.nan, dtype=dtype, device=device)
        self._free = list(range(len(self.data)))
        random.Random(5).shuffle(self._free)

    def add(
        self, slots: Tensor, start: int, committed: int, parents: tuple[int, ...] | None = None
    ) -> RowSpan:
        """A row whose slots [S, 2, kv heads, D] are filled; its tokens begin at `start`."""
        table = [self._free.pop() for _ in range(-(-len(slots) // PAGE))]
        for slot, values in enumerate(slots):
            self.data[table[slot // PAGE], :, :, slot % PAGE] = values.to(self.data)
        return RowSpan(start, start + len(slots) - committed, table, committed, parents)


def random_slots(shape: AttentionShape, count: int) -> Tensor:
    return torch.randn(count, 2, shape.num_kv_heads, shape.head_dim)


def queries(shape: AttentionShape, cache: Cache, count: int) -> Tensor:
    return torch.randn(count, shape.num_heads * shape.head_dim).to(cache.data)


def run(
    shape: AttentionShape,
    cache: Cache,
    rows: Sequence[RowSpan],
    q_TX: Tensor,
    max_parts: int = MAX_PARTS,
    programs: int = 2,
) -> Tensor:
    """What `attend` gives, a token more than there are in the bucket, all else poisoned."""
    num_tokens, device = len(q_TX), q_TX.device
    lengths = AttentionArrays.lengths(num_tokens + 1, MAX_PARTS, 256)
    host = {name: np.full(size, POISON, dtype=np.int32) for name, size in lengths.items()}
    plan_attention(rows, shape, max_parts, AttentionArrays(**host))
    step = AttentionArrays(**{name: torch.tensor(host[name], device=device) for name in host})
    workspace = AttentionWorkspace.of(shape, MAX_PARTS, programs, device)
    workspace.sums.fill_(torch.nan)
    workspace.softmax.fill_(torch.nan)
    out_TX = q_TX.new_full((num_tokens + 1, q_TX.shape[1]), torch.nan)
    attend(q_TX, cache.data, step, workspace, out_TX, shape, num_tokens + 1)
    assert out_TX[-1].isnan().all()
    return out_TX[:-1]


def mixed(shape: AttentionShape, cache: Cache) -> list[RowSpan]:
    """A long single token, a tree, a chunk and a single token without a past."""
    rows: list[RowSpan] = []
    for committed, count, parents in ((38, 1, None), (30, 5, TREE), (11, 7, None), (0, 1, None)):
        start = rows[-1].end if rows else 0
        rows.append(cache.add(random_slots(shape, committed + count), start, committed, parents))
    return rows


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize(
    ("shape", "dtype", "tolerance"),
    [
        (WIDE, torch.float32, 1e-6),
        (WINDOWED, torch.float32, 1e-6),
        (replace(WIDE, num_heads=8, head_dim=16), torch.bfloat16, 6e-3),
    ],
)
def test_equals_the_reference_and_each_row_alone(
    shape: AttentionShape, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    cache = Cache(shape, dtype, device)
    rows = mixed(shape, cache)
    q_TX = queries(shape, cache, rows[-1].end)
    out_TX = run(shape, cache, rows, q_TX)
    # The reference reads slots of a row's own last page that nothing has filled.
    q_THD = q_TX.view(len(q_TX), shape.num_heads, shape.head_dim).cpu()
    wanted_TX = attend_reference(q_THD, cache.data.nan_to_num(0.0).cpu(), rows, shape.window)
    assert (out_TX.cpu() - wanted_TX).norm() / wanted_TX.norm() < tolerance
    for row in rows:
        alone = replace(row, start=0, end=row.num_tokens)
        tokens = slice(row.start, row.end)
        assert torch.equal(run(shape, cache, [alone], q_TX[tokens]), out_TX[tokens])


def test_splits_in_turn_have_the_bits_of_splits_apart(device: torch.device) -> None:
    cache = Cache(WIDE, torch.float32, device)
    rows = mixed(WIDE, cache)
    q_TX = queries(WIDE, cache, rows[-1].end)
    out_TX = run(WIDE, cache, rows, q_TX)
    assert torch.equal(run(WIDE, cache, rows, q_TX, max_parts=3, programs=5), out_TX)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(WIDE, torch.float32), (WIDE, torch.bfloat16), (WINDOWED, torch.float32)],
)
def test_a_node_of_a_tree_has_the_bits_of_its_path(
    shape: AttentionShape, dtype: torch.dtype, device: torch.device
) -> None:
    """As a single token behind its ancestors, and as the last of a chunk."""
    cache, committed = Cache(shape, dtype, device), 30
    slots = random_slots(shape, committed + len(TREE))
    row = cache.add(slots, 0, committed, TREE)
    q_TX = queries(shape, cache, len(TREE))
    out_TX = run(shape, cache, [row], q_TX)
    for node, path in ((2, [0, 2]), (4, [0, 1, 3, 4])):
        chain = slots[[*range(committed), *(committed + each for each in path)]]
        behind = committed + len(path) - 1
        other = Cache(shape, dtype, device)
        single, chunk = other.add(chain, 0, behind), other.add(chain, 1, behind - 3)
        q_NX = torch.cat((q_TX[[node]], queries(shape, other, 3), q_TX[[node]]))
        got_NX = run(shape, other, [single, chunk], q_NX)
        assert torch.equal(got_NX[0], out_TX[node])
        assert torch.equal(got_NX[-1], out_TX[node])


def test_nan_of_a_branch_stays_there(device: torch.device) -> None:
    cache = Cache(WIDE, torch.float32, device)
    row = cache.add(random_slots(WIDE, 8), 0, 3, TREE)
    q_TX = queries(WIDE, cache, len(TREE))
    before_TX = run(WIDE, cache, [row], q_TX)
    cache.data[row.block_table[4 // PAGE], 0, :, 4 % PAGE] = torch.nan  # node 1, parent of 3
    cache.data[row.block_table[4 // PAGE], 1, :, 4 % PAGE] = torch.inf
    after_TX = run(WIDE, cache, [row], q_TX)
    assert torch.equal(after_TX[[0, 2]], before_TX[[0, 2]])
    assert after_TX[[1, 3, 4]].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_in_a_chunk_reaches_no_token_before_it(
    value: float, device: torch.device
) -> None:
    cache = Cache(WIDE, torch.float32, device)
    row = cache.add(random_slots(WIDE, 38), 0, 35)
    q_TX = queries(WIDE, cache, 3)
    before_TX = run(WIDE, cache, [row], q_TX)
    cache.data[row.block_table[36 // PAGE], 1, :, 36 % PAGE] = value
    after_TX = run(WIDE, cache, [row], q_TX)
    assert torch.equal(after_TX[0], before_TX[0])
    assert not after_TX[1:].isfinite().any()


def test_nan_outside_the_window_stays_there(device: torch.device) -> None:
    cache = Cache(WINDOWED, torch.float32, device)
    row = cache.add(random_slots(WINDOWED, 24), 0, 20)
    q_TX = queries(WINDOWED, cache, 4)
    before_TX = run(WINDOWED, cache, [row], q_TX)
    cache.data[row.block_table[3], :, :, 1] = torch.nan  # position 13: 20 and 21 see it
    after_TX = run(WINDOWED, cache, [row], q_TX)
    assert after_TX[:2].isnan().all()
    assert torch.equal(after_TX[2:], before_TX[2:])
    single = replace(row, committed=22, end=1)
    assert torch.equal(run(WINDOWED, cache, [single], q_TX[2:3]), before_TX[2:3])


def test_a_group_of_more_heads_than_a_tile_has_rows(device: torch.device) -> None:
    shape = AttentionShape(17, 1, 8, PAGE, None, block=16, split=32)
    cache = Cache(shape, torch.float32, device)
    row = cache.add(random_slots(shape, 7), 0, 5)
    q_TX = queries(shape, cache, 2)
    wanted_TX = attend_reference(q_TX.view(2, 17, 8).cpu(), cache.data.cpu(), [row], None)
    torch.testing.assert_close(run(shape, cache, [row], q_TX).cpu(), wanted_TX.float())
