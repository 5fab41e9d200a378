"""What a step brings to its device and back, counted on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class Transfers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The calls of torch by which values cross between the host and `META`, in order.

    events: "up" or "down" for each crossing, else the name of an operation on the device. What
    comes down is zeros. A number that the device gets as an argument of a call is no crossing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[str] = []

    @property
    def num_up(self) -> int:
        return self.events.count("up")

    @property
    def num_down(self) -> int:
        return self.events.count("down")

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        name = func.overloadpacket.__name__
        on_device = any(each.device == META for each in inputs)
        if name == "_local_scalar_dense" and on_device:
            self.events.append("down")
            return 0
        if name == "_to_copy" and on_device and kwargs.get("device") == torch.device("cpu"):
            if inputs[0].numel():
                self.events.append("down")
            return torch.zeros(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)
        found = func(*args, **kwargs)
        outputs = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        if any(each.device == META for each in (*inputs, *outputs)):
            # torch.tensor(..., device=...) shows as lift_fresh alone.
            crosses = name == "lift_fresh" or any(
                each.device.type == "cpu" and each.dim() for each in inputs
            )
            self.events.append("up" if crosses else name)
        return found


def traced(call: Callable[[], object]) -> Transfers:
    """What `call` brings to and fro."""
    transfers = Transfers()
    with torch.no_grad(), transfers:
        call()
    return transfers
