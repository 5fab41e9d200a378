"""Worker processes for tests: a pool on an event loop of its own, and jobs that never end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from lorastack.sandbox.pool import Pool
from lorastack.sandbox.tasks import TEMPLATE, template_body
from lorastack.sandbox.wire import Job, Limits
from lorastack.service.calls.call import Chat
from lorastack.service.calls.untrusted import GRAMMAR_LIMITS, TEMPLATE_LIMITS, Untrusted
from lorastack.text.conversation import Conversation
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer

T = TypeVar("T")

CHAT = (("system", "be brief"), ("user", "hi é 😀"), ("assistant", "yes?"), ("user", "a\n<b>"))
MAX_TEXT = 100_000
PATIENCE = 100.0
FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


class Sandbox:
    """A pool on an event loop that runs while somebody asks."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)
        self.runner = asyncio.Runner()
        grammars = GrammarCompiler(self.tokenizer, self.tokenizer.vocab_size)
        self.untrusted = Untrusted(
            self.tokenizer,
            grammars,
            MAX_TEXT,
            template_limits=replace(TEMPLATE_LIMITS, cpu=0.3, wall=PATIENCE),
            grammar_limits=replace(GRAMMAR_LIMITS, cpu=0.5, wall=PATIENCE),
        )

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(asyncio.wait_for(coroutine, PATIENCE))

    def render(self, template: str, messages: tuple[tuple[str, str], ...] = CHAT) -> str:
        return self.run(self.untrusted.render(template, Chat(messages), "caller"))

    def admit(self, wanted: JsonSchema | Regex) -> int:
        return self.run(self.untrusted.admit(wanted, "caller"))


async def started(pool: Pool, num_jobs: int) -> None:
    """Waits until `num_jobs` children run."""
    while sum(len(psutil.Process(pid).children()) for pid in pool.pids) < num_jobs:
        await asyncio.sleep(0.001)


def endless() -> Job:
    limits = Limits(cpu=1000, wall=1000, memory=1 << 28, output=100)
    return Job(
        task=TEMPLATE, body=template_body(FOR_EVER, Conversation([], None, {})), limits=limits
    )
