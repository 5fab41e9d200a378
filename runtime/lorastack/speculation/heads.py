"""An adapter's Medusa heads as views of its flat buffer. Nothing is copied.

What heads choose from: version 1 heads have an output matrix each; version 2 heads use the base
model's lm_head, of which the buffer may hold the rows of a draft vocabulary.

A private part has a correction of each block of other heads, and may have a draft vocabulary.

Shape suffixes: K heads, L blocks a head, H hidden, N outputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lorastack.kernels.heads import HeadsWeights, PrivateWeights
from lorastack.kernels.packing import view_run
from lorastack.kernels.upload import upload
from lorastack.layout import HEADS, AdapterLayout, Part


@dataclass(frozen=True, slots=True)
class Correction:
    """What a private part makes of other heads. output, ids_N: see `HeadsWeights`; None: theirs."""

    private: PrivateWeights
    output: Tensor | None
    ids_N: Tensor | None

    def of(self, heads: HeadsWeights) -> HeadsWeights:
        """These heads with the private part."""
        if self.output is None:
            return replace(heads, private=self.private)
        return replace(heads, private=self.private, output=self.output, ids_N=self.ids_N)


def heads_weights(buffer: Tensor, layout: AdapterLayout) -> HeadsWeights:
    """Views of the heads in `buffer`, which is flat, as `layout` describes.

    `output` is None if the heads choose from the base model's whole lm_head.
    """
    num_heads = layout.num_heads
    bias_XH = _run(buffer, layout, Part.BIAS).view(-1, layout.slots[0, HEADS, Part.BIAS].shape[0])
    size = bias_XH.shape[1]
    output, ids_N = _drafts(buffer, layout)
    if own_outputs(layout):
        output = _run(buffer, layout, Part.OUTPUT).view(num_heads, -1, size)
    return HeadsWeights(
        _run(buffer, layout, Part.WEIGHT).view(-1, num_heads, size, size),
        bias_XH.view(-1, num_heads, size),
        output,
        ids_N,
    )


def correction(buffer: Tensor, layout: AdapterLayout) -> Correction:
    """Views of a private part in `buffer`, which is flat, as `layout` describes."""
    rank, size = layout.slots[0, HEADS, Part.A].shape
    private = PrivateWeights(
        _run(buffer, layout, Part.A).view(-1, layout.num_heads, rank, size),
        _run(buffer, layout, Part.B).view(-1, layout.num_heads, size, rank),
    )
    return Correction(private, *_drafts(buffer, layout))


def _drafts(buffer: Tensor, layout: AdapterLayout) -> tuple[Tensor | None, Tensor | None]:
    """The base's rows of a draft vocabulary and its ids; None without one."""
    if not layout.draft_vocabulary:
        return None, None
    (ids_N,) = upload([layout.draft_vocabulary], buffer.device)
    return _run(buffer, layout, Part.DRAFT), ids_N


def own_outputs(layout: AdapterLayout) -> bool:
    """True for version 1 heads, which have an output matrix each."""
    return (0, HEADS, Part.OUTPUT) in layout.slots


def _run(buffer: Tensor, layout: AdapterLayout, part: Part) -> Tensor:
    """One view over all tensors of one part, which lie side by side: joined along their first
    dimension."""
    keys = sorted(key for key in layout.slots if key[1:] == (HEADS, part))
    return view_run(buffer, layout, tuple(keys))
