"""Embedding, norms, RoPE and SiLU: right, each row by itself, and nothing beyond the last row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from lorastack.kernels.triton.pointwise import (
    Projection,
    Rotations,
    add_norm,
    add_parts,
    embed,
    gather_norm,
    rope_write,
    silu_mul,
    turn,
)

DTYPES = (torch.float32, torch.bfloat16)
BUCKET, EPS = 6, 1e-5
counts = st.integers(0, BUCKET)
few = settings(max_examples=8)


def scalar(value: int, device: torch.device) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=device)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


@dataclass(frozen=True)
class Sums:
    """A random projection and its plain sum. Tokens without a LoRA have NaN for their part."""

    projection: Projection
    total_TO: Tensor

    @classmethod
    def of(cls, size: int, seed: int, device: torch.device) -> Sums:
        generator = torch.Generator().manual_seed(seed)
        num_parts, has_bias, has_lora = 1 + seed % 3, seed % 2 == 0, seed % 5 < 3
        parts_CTO = torch.randn(num_parts, BUCKET, size, generator=generator)
        bias_O = torch.randn(size, generator=generator)
        lora_TO = torch.randn(BUCKET, size, generator=generator)
        adapted_T = torch.randint(0, 2, (BUCKET,), generator=generator, dtype=torch.int32)
        lora_TO[adapted_T == 0] = torch.nan
        total_TO = parts_CTO[0].clone()
        for part_TO in parts_CTO[1:]:
            total_TO += part_TO
        if has_bias:
            total_TO += bias_O
        if has_lora:
            total_TO += torch.where(adapted_T[:, None] != 0, lora_TO, 0)
        projection = Projection(
            parts_CTO.to(device),
            bias_O.to(device) if has_bias else None,
            lora_TO.to(device) if has_lora else None,
            adapted_T.to(device) if has_lora else None,
        )
        return cls(projection, total_TO.to(device))

    def only(self, token: int) -> Projection:
        """The same for one token, in a bucket of its own."""
        one, projection = slice(token, token + 1), self.projection
        return Projection(
            projection.parts_CTO[:, one].contiguous(),
            projection.bias_O,
            None if projection.lora_TO is None else projection.lora_TO[one],
            None if projection.adapted_T is None else projection.adapted_T[one],
        )


def check_rows(out: Tensor, wanted: Tensor, count: int, *, exactly: bool = False) -> None:
    """The first `count` rows are as wanted, up to the rounding of their dtype; others are NaN."""
    step = 0.0 if exactly else 1e-6 if out.dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        out[:count].float(), wanted[:count].float(), rtol=step, atol=step / 8
    )
    assert out[count:].isnan().all()


def check_alone(run: Callable[[int], Tensor], out: Tensor, count: int) -> None:
    """The last row has the bits that it has in a bucket of one. run: makes them of a token."""
    if count:
        assert torch.equal(run(count - 1)[0], out[count - 1])


@few
@given(counts, st.integers(1, 1100), st.sampled_from(DTYPES))
def test_embed(device: torch.device, count: int, size: int, dtype: torch.dtype) -> None:
    ids_T = torch.randint(0, 9, (BUCKET,), dtype=torch.int32, device=device)
    embed_VH = torch.randn(9, size, device=device).to(dtype)
    hidden_TH = empty(BUCKET, size, dtype=torch.float32, device=device)
    embed(ids_T, embed_VH, hidden_TH, scalar(count, device))
    check_rows(hidden_TH, embed_VH[ids_T.long()], count, exactly=True)


@few
@given(counts, st.integers(1, 80), st.integers(0, 2**20), st.sampled_from(DTYPES))
def test_add_norm(
    device: torch.device, count: int, size: int, seed: int, dtype: torch.dtype
) -> None:
    sums = Sums.of(size, seed, device)
    norm_H, before_TH = torch.randn(size).to(device, dtype), torch.randn(BUCKET, size).to(device)
    before_TH[count:] = torch.nan
    wanted_TH = before_TH + sums.total_TO
    hidden_TH, x_TH = before_TH.clone(), empty(BUCKET, size, dtype=dtype, device=device)
    add_norm(sums.projection, hidden_TH, norm_H, x_TH, scalar(count, device), EPS)
    check_rows(hidden_TH, wanted_TH, count)
    check_rows(x_TH, rms_norm(hidden_TH, (size,), norm_H.float(), EPS), count)

    def alone(token: int) -> Tensor:
        hidden_1H = before_TH[token, None].clone()
        x_1H = empty(1, size, dtype=dtype, device=device)
        add_norm(sums.only(token), hidden_1H, norm_H, x_1H, scalar(1, device), EPS)
        assert torch.equal(hidden_1H[0], hidden_TH[token])
        return x_1H

    check_alone(alone, x_TH, count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_a_projection(device: torch.device, dtype: torch.dtype) -> None:
    hidden_TH, norm_H = torch.randn(BUCKET, 40).to(device), torch.randn(40).to(device, dtype)
    before_TH, x_TH = hidden_TH.clone(), empty(BUCKET, 40, dtype=dtype, device=device)
    add_norm(None, hidden_TH, norm_H, x_TH, scalar(4, device), EPS)
    assert torch.equal(hidden_TH, before_TH)
    check_rows(x_TH, rms_norm(hidden_TH, (40,), norm_H.float(), EPS), 4)


@few
@given(counts, st.integers(1, 80), st.integers(0, 2**20), st.sampled_from(DTYPES))
def test_gather_norm(
    device: torch.device, count: int, size: int, seed: int, dtype: torch.dtype
) -> None:
    """The bits of `add_norm` at the tokens that are wanted; the hidden state stays."""
    sums = Sums.of(size, seed, device)
    norm_H, before_TH = torch.randn(size).to(device, dtype), torch.randn(BUCKET, size).to(device)
    hidden_TH, x_TH = before_TH.clone(), empty(BUCKET, size, dtype=dtype, device=device)
    add_norm(sums.projection, hidden_TH, norm_H, x_TH, scalar(BUCKET, device), EPS)
    outputs_X = torch.randint(0, BUCKET, (BUCKET,), dtype=torch.int32, device=device)
    hidden_TH = before_TH.clone()
    out_XH = empty(BUCKET, size, dtype=dtype, device=device)
    wanted = (sums.projection, hidden_TH, outputs_X, norm_H, out_XH, scalar(count, device), EPS)
    gather_norm(*wanted)
    check_rows(out_XH, x_TH[outputs_X.long()], count, exactly=True)
    assert torch.equal(hidden_TH, before_TH)


@few
@given(counts, st.integers(1, 20), st.floats(0.5, 2))
def test_turn(device: torch.device, count: int, size: int, scale: float) -> None:
    """What the torch backend computes, see its `_frequencies`."""
    inv_freq_PF = torch.rand(200, size, device=device)
    positions_T, lasts_T = torch.randint(0, 200, (2, BUCKET), dtype=torch.int32, device=device)
    cos_TF, sin_TF = (empty(BUCKET, size, dtype=torch.float32, device=device) for _ in range(2))
    turn(inv_freq_PF, positions_T, lasts_T, scale, cos_TF, sin_TF, scalar(count, device))
    rows_T = torch.maximum(positions_T, lasts_T).long()
    angle_TF = positions_T[:, None].float() * inv_freq_PF[rows_T]
    check_rows(cos_TF, angle_TF.cos() * scale, count)
    check_rows(sin_TF, angle_TF.sin() * scale, count)


def rotated(x_TKD: Tensor, rotations: Rotations) -> Tensor:
    rows_T = rotations.rows_T.long()
    cos_T1F, sin_T1F = rotations.cos_NF[rows_T, None], rotations.sin_NF[rows_T, None]
    first, second = x_TKD.chunk(2, dim=-1)
    turned = (first * cos_T1F - second * sin_T1F, second * cos_T1F + first * sin_T1F)
    return torch.cat(turned, dim=-1)


@few
@given(
    counts,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([2, 6, 16, 24]),
    st.integers(1, 5),
    st.integers(0, 2**20),
    st.sampled_from(DTYPES),
)
def test_rope_write(
    device: torch.device,
    count: int,
    num_kv_heads: int,
    share: int,
    head_dim: int,
    page_size: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    """Slots of nobody stay NaN."""
    num_heads, num_pages = share * num_kv_heads, 7
    sums = Sums.of((num_heads + 2 * num_kv_heads) * head_dim, seed, device)
    angle_NF = torch.rand(20, head_dim // 2) * 6
    rows_T = torch.randint(0, 20, (BUCKET,), dtype=torch.int32, device=device)
    rotations = Rotations(angle_NF.cos().to(device), angle_NF.sin().to(device), rows_T)
    slots_T = torch.randperm(num_pages * page_size)[:BUCKET].int().to(device)

    def run(projection: Projection, token: int | None) -> tuple[Tensor, Tensor]:
        one = slice(None) if token is None else slice(token, token + 1)
        tokens = 1 if token is not None else count
        q_THD = empty(len(slots_T[one]), num_heads, head_dim, dtype=dtype, device=device)
        shape = (num_pages, 2, num_kv_heads, page_size, head_dim)
        kv = empty(*shape, dtype=dtype, device=device)
        turns = Rotations(rotations.cos_NF, rotations.sin_NF, rows_T[one])
        rope_write(projection, turns, slots_T[one], q_THD, kv, scalar(tokens, device))
        return q_THD, kv.movedim(3, 1).flatten(0, 1)  # by slot

    q_THD, kv_S2KD = run(sums.projection, None)
    heads_TND = sums.total_TO.view(BUCKET, -1, head_dim)
    qk_TND = rotated(heads_TND[:, : num_heads + num_kv_heads], rotations)
    check_rows(q_THD, qk_TND[:, :num_heads], count)
    slots = slots_T[:count].long()
    check_rows(kv_S2KD[slots, 0], qk_TND[:count, num_heads:], count)
    check_rows(kv_S2KD[slots, 1], heads_TND[:count, num_heads + num_kv_heads :], count)
    others = torch.ones(len(kv_S2KD), dtype=torch.bool, device=device)
    others[slots] = False
    assert kv_S2KD[others].isnan().all()
    if count:
        q_1HD, alone_S2KD = run(sums.only(count - 1), count - 1)
        assert torch.equal(q_1HD[0], q_THD[count - 1])
        assert torch.equal(alone_S2KD[slots[-1]], kv_S2KD[slots[-1]])


@few
@given(counts, st.integers(1, 1100), st.integers(0, 2**20), st.sampled_from(DTYPES))
def test_silu_mul(
    device: torch.device, count: int, size: int, seed: int, dtype: torch.dtype
) -> None:
    sums = Sums.of(2 * size, seed, device)
    gate_TI, up_TI = sums.total_TO.chunk(2, dim=1)
    inner_TI = empty(BUCKET, size, dtype=dtype, device=device)
    silu_mul(sums.projection, inner_TI, scalar(count, device))
    check_rows(inner_TI, silu(gate_TI) * up_TI, count)

    def alone(token: int) -> Tensor:
        inner_1I = empty(1, size, dtype=dtype, device=device)
        silu_mul(sums.only(token), inner_1I, scalar(1, device))
        return inner_1I

    check_alone(alone, inner_TI, count)


def test_silu_of_large_values(device: torch.device) -> None:
    gate_I = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30, torch.inf], device=device)
    parts_1TI = torch.cat((gate_I, torch.ones(7, device=device)))[None, None]
    inner_TI = empty(1, 7, dtype=torch.float32, device=device)
    silu_mul(Projection(parts_1TI), inner_TI, scalar(1, device))
    torch.testing.assert_close(inner_TI[0], silu(gate_I))


@few
@given(counts, st.integers(1, 1100), st.integers(0, 2**20), st.booleans())
def test_add_parts(device: torch.device, count: int, size: int, seed: int, in_place: bool) -> None:
    sums = Sums.of(size, seed, device)
    out_XO = empty(BUCKET, size, dtype=torch.float32, device=device)
    if in_place:
        out_XO = sums.projection.parts_CTO[0]
        out_XO[count:] = torch.nan
    add_parts(sums.projection, out_XO, scalar(count, device))
    check_rows(out_XO, sums.total_TO, count)


def test_a_row_that_is_not_finite_stays_by_itself(device: torch.device) -> None:
    hidden_TH, norm_H = torch.randn(4, 40).to(device), torch.ones(40, device=device)
    x_TH, sound_TH = (empty(4, 40, dtype=torch.float32, device=device) for _ in range(2))
    add_norm(None, hidden_TH, norm_H, sound_TH, scalar(4, device), EPS)
    hidden_TH[1, 5] = torch.nan
    add_norm(None, hidden_TH, norm_H, x_TH, scalar(4, device), EPS)
    assert x_TH[1].isnan().all()
    assert torch.equal(x_TH[[0, 2, 3]], sound_TH[[0, 2, 3]])
