"""Keeps in the store what the engine learns about heads."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor

from lorastack.adapters.store.learned import Learned
from lorastack.engine.engine import Engine
from lorastack.service.edge.threads import run_in

SAVE_SECONDS = 60.0  # from one save to the next

logger = logging.getLogger(__name__)


class LearnedKeeper:
    """Takes what was learnt from the step thread; the thread that changes the store writes it."""

    def __init__(self, learned: Learned, engine: Engine, writer: Executor) -> None:
        """writer: one thread, which makes all changes of the store."""
        self._learned = learned
        self._engine = engine
        self._writer = writer

    async def run(self) -> None:
        """Saves now and then, until it is cancelled."""
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self.save()

    async def save(self) -> None:
        """Saves what changed since the last call; a failed write is logged."""
        newer = await asyncio.wrap_future(self._engine.learned())

        def write() -> None:
            self._learned.save({digest: known.to_json() for digest, known in newer.items()})

        try:
            await run_in(self._writer, write)
        except OSError as error:
            logger.warning("what was learnt about heads could not be saved: %s", error)
