"""Medusa heads: from the states of a step's rows to what each head proposes.

Contract. Rows are taken in groups that share their heads; with K heads of L blocks

    r_k = x, then L times r_k + SiLU(z_lk)                     `states`, [sum of rows x K, H]
    z_lk = W_lk r_k + b_lk, and with a private part + B_lk (A_lk r_k)
    tokens of (row, k) = the best of output_k r_k              `propose`, [sum of rows x K, num]

ordered by (row, head), group after group. Groups may be empty and differ in heads, blocks, outputs
and private parts; a group's output is one matrix [N, H] for all its heads or one a head, [K, N, H],
and its row n stands for token ids_N[n] (n itself without ids). r is rounded to its dtype after each
block, and A r as well; all sums are float32. A B of zeros changes no bit of a finite state.

Tokens are int64 ids, best first, ties to the lowest place; NaN counts as minus infinity. Where a
head has fewer than `num` outputs, its best stands for what is missing. Beside them are their
natural log-probabilities, float32, over all of that head's outputs: NaN where any of its logits in
that row is not finite. `top` gives the same of rows of logits [X, V].

The native kernel reads the matrices where they lie and runs as one parallel region; neighbouring
groups with the same blocks share each reading of them, whatever their private parts and outputs. A
row's bits do not depend on the rows beside it. Plain torch takes a few matmuls a group, on any
device. The plain reference works row by row. Source of the maths: Medusa (FasterDecoding/Medusa),
versions 1 and 2 of its heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa


@dataclass(frozen=True, slots=True)
class PrivateWeights:
    """A low-rank correction of every head's blocks, for one LoRA: W + B A stands for W.

    Contiguous, of the heads' dtype and device; any rank from 1 on.
    """

    a_LKRH: Tensor
    b_LKHR: Tensor

    @property
    def rank(self) -> int:
        return self.a_LKRH.shape[2]


@dataclass(frozen=True, slots=True)
class HeadsWeights:
    """output: [N, H] or [K, N, H]; None: `states` alone serves. ids_N: int64, beside the output."""

    weight_LKHH: Tensor
    bias_LKH: Tensor
    output: Tensor | None
    ids_N: Tensor | None
    private: PrivateWeights | None = None

    @property
    def num_heads(self) -> int:
        return self.bias_LKH.shape[1]


@dataclass(frozen=True, slots=True)
class HeadsGroup:
    """Rows start..end and the heads that they share."""

    start: int
    end: int
    heads: HeadsWeights

    @property
    def num_states(self) -> int:
        return (self.end - self.start) * self.heads.num_heads


class TopTokens(NamedTuple):
    """ids_XR: int64, best first; logprobs_XR: float32."""

    ids_XR: Tensor
    logprobs_XR: Tensor


Top = Callable[[Tensor, int], TopTokens]  # `top` of float32 logits


def states_torch(hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> Tensor:
    """See the module. hidden_BH: contiguous, of the heads' dtype, on any device.

    One matmul a group and block, and two for a private part.
    """
    parts_XH = [hidden_BH[:0]]
    for group in groups:
        heads, x_BH = group.heads, hidden_BH[group.start : group.end]
        size = x_BH.shape[1]
        r_BKH = x_BH[:, None].expand(-1, heads.num_heads, -1)
        for block, bias_KH in enumerate(heads.bias_LKH):
            weight_KHH = heads.weight_LKHH[block]
            if block == 0:  # the first blocks of all heads read the same state: one plain matmul
                z_BKH = linear(x_BH, weight_KHH.view(-1, size), bias_KH.view(-1)).view_as(r_BKH)
            else:
                z_BKH = torch.einsum("bki,koi->bko", r_BKH, weight_KHH) + bias_KH
            if heads.private is not None:
                a_KRH, b_KHR = heads.private.a_LKRH[block], heads.private.b_LKHR[block]
                shrunk_BKR = torch.einsum("bki,kri->bkr", r_BKH, a_KRH)
                z_BKH = z_BKH + torch.einsum("bkr,kor->bko", shrunk_BKR, b_KHR)
            r_BKH = r_BKH + silu(z_BKH)
        parts_XH.append(r_BKH.reshape(-1, size))
    return torch.cat(parts_XH)


def top_torch(logits_XV: Tensor, num: int) -> TopTokens:
    """See the module. logits_XV: V at least 1, on any device.

    topk cuts ties anywhere: those rows are sorted.
    """
    ordered_XV = logits_XV.where(~logits_XV.isnan(), -torch.inf)
    if num >= logits_XV.shape[1]:
        return _weighed(logits_XV, _sorted(ordered_XV, num))
    values_XR, places_XR = ordered_XV.topk(num + 1)
    tied_X = (values_XR[:, 1:] == values_XR[:, :-1]).any(dim=1)
    for row in tied_X.nonzero()[:, 0].tolist():
        places_XR[row, :num] = _sorted(ordered_XV[row : row + 1], num)[0]
    return _weighed(logits_XV, places_XR[:, :num])


def _weighed(logits_XV: Tensor, places_XR: Tensor) -> TopTokens:
    logprobs_XR = logits_XV.log_softmax(dim=-1).gather(1, places_XR).float()
    finite_X = logits_XV.isfinite().all(dim=-1, keepdim=True)
    return TopTokens(places_XR, logprobs_XR.where(finite_X, torch.nan))


def propose_torch(
    hidden_BH: Tensor, groups: Sequence[HeadsGroup], num: int, top: Top = top_torch
) -> TopTokens:
    """See the module. hidden_BH: as in `states_torch`; num, groups: as in `propose_native`.

    top: runs in place of `top_torch`. One matmul a group.
    """
    parts: list[TopTokens] = []
    for group, part_XH in _parts(states_torch(hidden_BH, groups), groups):
        output = group.heads.output
        assert output is not None
        if output.dim() == 2:
            logits_XN = linear(part_XH, output)
        else:
            r_BKH = part_XH.view(-1, group.heads.num_heads, part_XH.shape[1])
            logits_XN = torch.einsum("bkh,knh->bkn", r_BKH, output).flatten(0, 1)
        parts.append(_named(top(logits_XN.float().contiguous(), num), group.heads))
    return _joined(parts, num, hidden_BH.device)


def states_native(isa: Isa, hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> Tensor:
    """See the module. hidden_BH: contiguous on a CPU that has `isa`, of one of its dtypes, H a
    multiple of `matrix.PAD`."""
    return _native(isa, hidden_BH, groups, None)


def propose_native(
    isa: Isa, hidden_BH: Tensor, groups: Sequence[HeadsGroup], num: int
) -> TopTokens:
    """See the module. hidden_BH: as in `states_native`; num: 1 to MAX_RANK; every group has an
    output."""
    best = _room(sum(group.num_states for group in groups), num)
    _native(isa, hidden_BH, groups, best)
    return best


def top_native(isa: Isa, logits_XV: Tensor, num: int) -> TopTokens:
    """`top_torch` of contiguous float32 logits on a CPU that has `isa`, which computes in it."""
    rows, columns = logits_XV.shape
    best = _room(rows, num)
    library = native.library()
    assert library is not None
    library.lorastack_top(
        *(isa, logits_XV.data_ptr(), rows, columns, num),
        *(best.ids_XR.data_ptr(), best.logprobs_XR.data_ptr(), torch.get_num_threads()),
    )
    return best


def _native(
    isa: Isa, hidden_BH: Tensor, groups: Sequence[HeadsGroup], out: TopTokens | None
) -> Tensor:
    """The states; fills `out`."""
    num_states = sum(group.num_states for group in groups)
    r_XH = torch.empty(num_states, hidden_BH.shape[1], dtype=hidden_BH.dtype)
    structs = (native.Heads * len(groups))(*(_struct(group) for group in groups))
    call = native.Proposal(
        ctypes.addressof(structs),
        hidden_BH.data_ptr(),
        r_XH.data_ptr(),
        None if out is None else out.ids_XR.data_ptr(),
        None if out is None else out.logprobs_XR.data_ptr(),
        len(groups),
        hidden_BH.shape[1],
        0 if out is None else out.ids_XR.shape[1],
        torch.get_num_threads(),
        isa,
        hidden_BH.dtype == torch.bfloat16,
    )
    library = native.library()
    assert library is not None
    library.lorastack_propose(call)
    return r_XH


def _struct(group: HeadsGroup) -> native.Heads:
    """Borrows the group's tensors."""
    heads, output, private = group.heads, group.heads.output, group.heads.private
    return native.Heads(
        heads.weight_LKHH.data_ptr(),
        heads.bias_LKH.data_ptr(),
        None if output is None else output.data_ptr(),
        None if heads.ids_N is None else heads.ids_N.data_ptr(),
        None if private is None else private.a_LKRH.data_ptr(),
        None if private is None else private.b_LKHR.data_ptr(),
        group.start,
        group.end,
        heads.num_heads,
        len(heads.bias_LKH),
        0 if output is None else output.shape[-2],
        output is not None and output.dim() == 3,
        0 if private is None else private.rank,
    )


def _parts(r_XH: Tensor, groups: Sequence[HeadsGroup]) -> Iterator[tuple[HeadsGroup, Tensor]]:
    """Each group and its states."""
    start = 0
    for group in groups:
        end = start + group.num_states
        yield group, r_XH[start:end]
        start = end


def _named(best: TopTokens, heads: HeadsWeights) -> TopTokens:
    """The same with tokens in place of the outputs' places."""
    return best if heads.ids_N is None else best._replace(ids_XR=heads.ids_N[best.ids_XR])


def _joined(parts: Sequence[TopTokens], num: int, device: torch.device) -> TopTokens:
    if not parts:
        return TopTokens(*(each.to(device) for each in _room(0, num)))
    ids, logprobs = zip(*parts, strict=True)
    return TopTokens(torch.cat(ids), torch.cat(logprobs))


def _room(rows: int, num: int) -> TopTokens:
    return TopTokens(torch.empty(rows, num, dtype=torch.int64), torch.empty(rows, num))


def states_reference(hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> Tensor:
    """What `states` computes, one block of one head of one row at a time."""
    parts_XH = [hidden_BH[:0]]
    for group in groups:
        heads = group.heads
        for x_H in hidden_BH[group.start : group.end]:
            for head in range(heads.num_heads):
                r_H = x_H
                for block in range(len(heads.bias_LKH)):
                    z_H = _z_reference(r_H, heads, block, head)
                    r_H = (r_H.float() + silu(z_H)).to(x_H.dtype)
                parts_XH.append(r_H[None])
    return torch.cat(parts_XH)


def _z_reference(r_H: Tensor, heads: HeadsWeights, block: int, head: int) -> Tensor:
    """What a block of a head gives to SiLU."""
    z_H = heads.weight_LKHH[block, head].float() @ r_H.float() + heads.bias_LKH[block, head].float()
    if heads.private is not None:
        a_RH, b_HR = heads.private.a_LKRH[block, head], heads.private.b_LKHR[block, head]
        shrunk_R = (a_RH.float() @ r_H.float()).to(r_H.dtype)
        z_H += b_HR.float() @ shrunk_R.float()
    return z_H


def propose_reference(hidden_BH: Tensor, groups: Sequence[HeadsGroup], num: int) -> TopTokens:
    """What `propose` computes, one head of one row at a time."""
    parts: list[TopTokens] = []
    for group, part_XH in _parts(states_reference(hidden_BH, groups), groups):
        heads, output = group.heads, group.heads.output
        assert output is not None
        for row, r_H in enumerate(part_XH):
            output_NH = output[row % heads.num_heads] if output.dim() == 3 else output
            logits_N = output_NH.float() @ r_H.float()
            parts.append(_named(top_reference(logits_N[None], num), heads))
    return _joined(parts, num, hidden_BH.device)


def top_reference(logits_XV: Tensor, num: int) -> TopTokens:
    """What `top` computes, by a full sort and in float64."""
    ordered_XV = logits_XV.where(~logits_XV.isnan(), -torch.inf)
    return _weighed(logits_XV.double(), _sorted(ordered_XV, num))


def _sorted(ordered_XV: Tensor, num: int) -> Tensor:
    """The best places by a full sort; the very best stands for those missing."""
    places_XR = ordered_XV.sort(dim=-1, descending=True, stable=True).indices[:, :num]
    missing = num - places_XR.shape[1]
    return torch.cat([places_XR, places_XR[:, :1].expand(-1, missing)], dim=1)
