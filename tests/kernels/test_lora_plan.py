"""The numbers that the LoRA kernels of Triton read."""

from __future__ import annotations

import numpy as np
import torch

from lorastack.kernels.segmented_lora import GroupLora, TargetLora
from lorastack.kernels.triton.launch import float_bits
from lorastack.kernels.triton.lora_plan import (
    PAIR_FIELDS,
    SITE_FIELDS,
    TILE_FIELDS,
    AdapterTable,
    LoraArrays,
    LoraUse,
    embedding_site,
    plan_lora,
    site_of,
    workspace_size,
)

CPU = torch.device("cpu")


def group(first: int, second: int) -> GroupLora:
    """Of the first and the third target of a group, with these ranks."""
    targets = (
        TargetLora(0, slice(0, first), torch.ones(6, first), 0.5),
        TargetLora(2, slice(first, first + second), torch.ones(4, second), 3.0),
    )
    return GroupLora(torch.ones(first + second, 8), targets)


def test_a_table_says_where_an_adapter_lies() -> None:
    layer, head, embedding = group(3, 14), group(2, 1), group(1, 1)
    table = AdapterTable.of({(1, 0): layer, (-1, 4): head}, embedding, 2, CPU)
    assert table.entries.shape == (2 * 4 + 2, SITE_FIELDS)
    assert table.address == table.entries.data_ptr()
    assert table.width == 32
    assert table.adapts_lm_head
    assert table.adapts_embedding
    filled = {site_of(1, 0, 2): layer, site_of(-1, 4, 2): head, embedding_site(2): embedding}
    assert sorted(filled) == [4, 8, 9]
    for site, row in enumerate(table.entries.tolist()):
        if site not in filled:
            assert row == [0] * SITE_FIELDS
            continue
        found = filled[site]
        first, third = found.targets
        rank = first.rank.stop
        assert row[:2] == [found.a_RI.data_ptr(), len(found.a_RI)]
        assert row[2:6] == [first.b_OR.data_ptr(), 0, rank, float_bits(0.5)]
        assert row[6:10] == [0] * 4
        assert row[10:] == [third.b_OR.data_ptr(), rank, len(found.a_RI) - rank, float_bits(3.0)]


def test_an_adapter_without_a_lora_has_an_empty_table() -> None:
    table = AdapterTable.of({}, None, 1, CPU)
    assert not table.entries.any()
    assert (table.width, table.adapts_lm_head, table.adapts_embedding) == (0, False, False)


def test_tiles_have_tokens_of_one_stack() -> None:
    wide = AdapterTable.of({(0, 0): group(20, 1)}, None, 1, CPU)
    narrow = AdapterTable.of({(0, 1): group(1, 1)}, None, 1, CPU)
    uses = [
        LoraUse(1, 19, wide, 1.0),
        LoraUse(1, 19, narrow, 0.25),
        LoraUse(19, 19, wide, 1.0),  # of no token
        LoraUse(20, 21, narrow, -1.0),
    ]
    into = LoraArrays(
        counts=np.zeros(2, np.int32),
        adapted_T=np.full(24, 7, np.int32),
        tiles=np.full((24, TILE_FIELDS), 7, np.int32),
        pairs=np.full((24, PAIR_FIELDS), 7, np.int64),
    )
    plan_lora(uses, 22, into)
    assert into.counts.tolist() == [3, 5]
    assert into.adapted_T.tolist() == [0, *[1] * 18, 0, 1, 0, 7, 7]
    assert into.tiles[:3].tolist() == [[1, 16, 0, 2], [17, 2, 2, 2], [20, 1, 4, 1]]
    assert into.pairs[:5].tolist() == [
        [1, 16, wide.address, float_bits(1.0), 0, 32],
        [1, 16, narrow.address, float_bits(0.25), 512, 16],
        [17, 2, wide.address, float_bits(1.0), 768, 32],
        [17, 2, narrow.address, float_bits(0.25), 832, 16],
        [20, 1, narrow.address, float_bits(-1.0), 864, 16],
    ]
    assert workspace_size(uses) == 864 + 16
    assert (into.tiles[3:] == 7).all()
    assert (into.pairs[5:] == 7).all()


def test_a_step_of_the_base_model_has_no_tiles() -> None:
    into = LoraArrays(
        counts=np.full(2, 7, np.int32),
        adapted_T=np.full(3, 7, np.int32),
        tiles=np.zeros((1, TILE_FIELDS), np.int32),
        pairs=np.zeros((1, PAIR_FIELDS), np.int64),
    )
    plan_lora([], 2, into)
    assert into.counts.tolist() == [0, 0]
    assert into.adapted_T.tolist() == [0, 0, 7]
