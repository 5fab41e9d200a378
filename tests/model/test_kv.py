"""Moving and clearing KV."""

from __future__ import annotations

import torch

from lorastack.layout import ModelShapes
from lorastack.model.kv import KVCache, Move, page_nbytes


def filled(shapes: ModelShapes) -> KVCache:
    kv = KVCache(shapes, 6, 4, torch.float32, torch.device("cpu"))
    kv.data.copy_(torch.arange(kv.data.numel()).view_as(kv.data))
    return kv


def by_slot(data: torch.Tensor) -> torch.Tensor:
    """[num_layers, num_pages, page_size, ...]"""
    return data.movedim(4, 2)


def test_overlapping_move_reads_before_it_writes(tiny_llama_shapes: ModelShapes):
    kv = filled(tiny_llama_shapes)
    before = kv.data.clone()
    table, other = [4, 1, 3], [2, 0]
    kv.move([Move(table, [5, 6, 9], [4, 5, 6]), Move(other, [3], [1])])
    where = {slot: (table[slot // 4], slot % 4) for slot in range(12)}
    pairs = [(where[src], where[dst]) for src, dst in ((5, 4), (6, 5), (9, 6))]
    pairs.append(((2, 3), (2, 1)))
    for src, dst in pairs:
        assert torch.equal(by_slot(kv.data)[:, *dst], by_slot(before)[:, *src])
    changed = by_slot(kv.data != before).flatten(3).any(-1).any(0).nonzero().tolist()
    assert changed == sorted(list(dst) for _, dst in pairs)


def test_moving_nothing(tiny_llama_shapes: ModelShapes):
    kv = filled(tiny_llama_shapes)
    before = kv.data.clone()
    kv.move([])
    kv.move([Move([0], [], [])])
    assert torch.equal(kv.data, before)


def test_clear_zeroes_only_the_named_pages(tiny_llama_shapes: ModelShapes):
    kv = filled(tiny_llama_shapes)
    kv.data += 1
    kv.clear(torch.tensor([2, 5]))
    kv.clear(torch.tensor([], dtype=torch.int64))
    assert (kv.data == 0).flatten(2).all(-1).all(0).tolist() == [i in (2, 5) for i in range(6)]


def test_page_nbytes_is_what_a_page_takes(tiny_mistral_shapes: ModelShapes):
    for dtype in (torch.float32, torch.bfloat16):
        kv = KVCache(tiny_mistral_shapes, 3, 8, dtype, torch.device("cpu"))
        assert page_nbytes(tiny_mistral_shapes, 8, dtype) * 3 == kv.data.nbytes
