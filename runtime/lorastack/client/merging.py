"""The request of a merge, out of the words that its callers use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from lorastack.errors import InvalidArgumentError
from lorastack.v1 import adapters_pb2
from lorastack.v1.generation_pb2 import LoraRef

Strategy = Literal["ties", "dare_linear", "dare_ties"]
MajoritySign = Literal["total", "frequency"]


def merge_request(
    loras: Sequence[LoraRef], strategy: Strategy, density: float, majority_sign: MajoritySign
) -> adapters_pb2.MergeAdaptersRequest:
    """Raises InvalidArgumentError for a word that is neither."""
    for field, word, known in (
        ("strategy", strategy, get_args(Strategy)),
        ("majority_sign", majority_sign, get_args(MajoritySign)),
    ):
        if word not in known:
            raise InvalidArgumentError(f"{field} must be one of {', '.join(known)}", field=field)
    return adapters_pb2.MergeAdaptersRequest(
        loras=loras,
        strategy=strategy.upper(),
        density=density,
        majority_sign=majority_sign.upper(),
    )
