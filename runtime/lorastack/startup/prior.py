"""What adaptive trees start from, as heads bring it, before the server takes it in."""

from __future__ import annotations

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.speculation.calibration import Calibration


def check_acceptance(text: str, num_heads: int) -> None:
    """Raises InvalidArgumentError unless trees of so many heads can start from `acceptance`."""
    remedy = "have `lorastack train eval` write it again, or leave it out"
    try:
        known = Calibration.parse(text)
    except ValueError as error:
        raise InvalidArgumentError(
            f"acceptance in config.json is no calibration of this version ({error}): {remedy}",
            reason=Reason.INVALID_ADAPTER,
        ) from error
    if known.num_heads > num_heads:
        raise InvalidArgumentError(
            f"acceptance in config.json knows {known.num_heads} heads, the folder has {num_heads}: "
            f"{remedy}",
            reason=Reason.INVALID_ADAPTER,
        )
