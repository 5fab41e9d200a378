"""How far a stage of training is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then from the thread that works."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """stage: what is going on, such as "distilling". It ends with done == total, or where
        another one begins. note: what else is to be seen, such as the loss.
        """
        ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """A Progress that nobody watches."""
