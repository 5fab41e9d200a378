"""How many examples a test tries."""

from __future__ import annotations

from hypothesis import settings


def at_most(count: int) -> settings:
    """For slow tests: so many, or what the profile says where that is less."""
    return settings(max_examples=min(count, settings().max_examples))
