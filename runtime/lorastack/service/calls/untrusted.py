"""What callers write that is a program, run in worker processes: chat templates and grammars."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from dataclasses import replace
from typing import NoReturn

from lorastack.config import MIB
from lorastack.errors import InternalError, InvalidArgumentError, Reason, ResourceExhaustedError
from lorastack.sandbox.pool import JobError, Pool
from lorastack.sandbox.tasks import GRAMMAR, TEMPLATE, template_body
from lorastack.sandbox.wire import Job, Limits, Outcome
from lorastack.service.calls.call import Chat
from lorastack.text.conversation import conversation
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex, refuse
from lorastack.text.tokenizer import Tokenizer, template_refusal
from lorastack.text.trial import trial_body

TEMPLATE_LIMITS = Limits(cpu=0.5, wall=20.0, memory=256 * MIB, output=0)  # output: the text's
GRAMMAR_LIMITS = Limits(cpu=1.0, wall=20.0, memory=128 * MIB, output=4096)
MAX_VERDICTS = 1024
MAX_NAMES = 256  # templates whose variables are remembered
NAMES_BYTES = 1 << 17  # of one template's variables, JSON
UPLOADER = "an upload"  # all uploads queue for workers as one caller
UPLOAD_PATIENCE = 10.0  # seconds that the store's one thread waits for a verdict

Wanted = JsonSchema | Regex


class Untrusted:
    """Runs callers' programs in a pool of processes. Event loop only, but for check_template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        max_text: int,
        *,
        template_limits: Limits = TEMPLATE_LIMITS,
        grammar_limits: Limits = GRAMMAR_LIMITS,
    ) -> None:
        """max_text: bytes of text that a template may give."""
        self._tokenizer = tokenizer
        self._models_own = tokenizer.chat_template
        self._grammars = grammars
        self._template_limits = replace(template_limits, output=max_text)
        self._grammar_limits = grammar_limits
        self._loop: asyncio.AbstractEventLoop | None = None
        # By the hash of a grammar's text: the bytes that it takes, or why it was refused.
        self._verdicts: OrderedDict[bytes, int | str] = OrderedDict()
        # By the hash of a template: the variables that it reads.
        self._names: OrderedDict[bytes, list[str]] = OrderedDict()
        self.pool = Pool(
            {
                TEMPLATE: lambda: {"variables": tokenizer.template_variables},
                GRAMMAR: grammars.trial_setup,
            }
        )

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sets the loop that serves, on which `check_template` runs its job."""
        self._loop = loop

    async def close(self) -> None:
        """Ends the worker processes; whoever waits gets UnavailableError."""
        await self.pool.close()

    async def render(self, template: str | None, chat: Chat, caller: str) -> str:
        """A conversation as text. template: None is the model's own.

        Raises InvalidArgumentError, also for what is given and the template does not read, and
        what `Pool.run` raises.
        """
        fields = chat.fields or ("",) * len(chat.messages)
        special = self._tokenizer.template_variables
        given = await asyncio.to_thread(
            conversation, chat.messages, fields, chat.tools, chat.variables, special
        )
        if template is None:
            template = self._tokenizer.template(with_tools=given.tools is not None)
        if not chat.is_plain:
            given.check_read(template, await self._read_by(template, caller))
        body = await asyncio.to_thread(template_body, template, given)
        job = Job(task=TEMPLATE, body=body, limits=self._template_limits)
        try:
            return (await self.pool.run(job, caller)).decode()
        except JobError as error:
            self._refuse_template(error)

    async def _read_by(self, template: str, caller: str) -> list[str]:
        """The names of the variables that a template reads."""
        key = hashlib.sha256(template.encode()).digest()
        if (names := self._names.get(key)) is not None:
            self._names.move_to_end(key)
            return names
        try:
            names = list(json.loads(await self.pool.run(self._compiling(template), caller)))
        except JobError as error:
            self._refuse_template(error)
        self._names[key] = names
        if len(self._names) > MAX_NAMES:
            self._names.popitem(last=False)
        return names

    def _compiling(self, template: str) -> Job:
        limits = replace(self._template_limits, output=NAMES_BYTES)
        return Job(task=TEMPLATE, body=template_body(template, None), limits=limits)

    def check_template(self, template: str) -> None:
        """Raises InvalidArgumentError for one that does not compile. Not for the event loop.

        What takes too long to compile, or waits too long for a worker, is left to the first chat.
        """
        if template == self._models_own:
            return
        assert self._loop is not None, "attach() comes first"
        job = self._compiling(template)
        compiling = asyncio.run_coroutine_threadsafe(self.pool.run(job, UPLOADER), self._loop)
        try:
            compiling.result(UPLOAD_PATIENCE)
        except JobError as error:
            if error.outcome is Outcome.REFUSED:
                raise InvalidArgumentError(
                    f"chat_template cannot be compiled: {error.message}; repair it, or leave it "
                    "out to use the model's",
                    reason=Reason.INVALID_ADAPTER,
                ) from None
        except TimeoutError:
            compiling.cancel()
        except ResourceExhaustedError:
            pass

    async def admit(self, wanted: Wanted, caller: str) -> int:
        """Tries a grammar out; only what passes may be compiled here. Returns the bytes it takes.

        Raises InvalidArgumentError, and what `Pool.run` raises.
        """
        self._grammars.check_model()
        body = trial_body(wanted)
        key = hashlib.sha256(body).digest()
        job = Job(task=GRAMMAR, body=body, limits=self._grammar_limits)

        def known() -> bytes | None:
            """The verdict of a trial that ended while this one waited."""
            if (verdict := self._verdicts.get(key)) is None:
                return None
            self._verdicts.move_to_end(key)
            if isinstance(verdict, str):
                refuse(wanted, verdict)
            return str(verdict).encode()

        try:
            num_bytes = int(known() or await self.pool.run(job, caller, known))
        except JobError as error:
            cause = self._why_not(error)
            self._remember(key, cause)
            refuse(wanted, cause)
        self._remember(key, num_bytes)
        return num_bytes

    def _refuse_template(self, error: JobError) -> NoReturn:
        limits = self._template_limits
        match error.outcome:
            case Outcome.REFUSED:
                raise InvalidArgumentError(template_refusal(error.message)) from None
            case Outcome.TOO_SLOW:
                cause = f"takes more than {limits.cpu:g} s of processor time"
            case Outcome.TOO_MUCH_MEMORY:
                cause = f"takes more than {limits.memory / MIB:g} MiB of memory"
            case Outcome.TOO_LONG:
                cause = f"gives more than {limits.output} bytes of text"
            case Outcome.CRASHED:
                cause = "nests too deep"
            case _:
                raise _not_the_callers(error) from None
        raise InvalidArgumentError(
            f"The chat template {cause}: shorten the chat, send a prompt, or repair the template."
        ) from None

    def _why_not(self, error: JobError) -> str:
        match error.outcome:
            case Outcome.REFUSED:
                return error.message
            case Outcome.TOO_SLOW:
                return f"it takes too long to compile, more than {self._grammar_limits.cpu:g} s"
            case Outcome.TOO_MUCH_MEMORY:
                megabytes = self._grammar_limits.memory / MIB
                return f"it takes too much memory to compile, more than {megabytes:g} MiB"
            case Outcome.CRASHED:
                return "it is too complex, or nests too deep"
        raise _not_the_callers(error) from None

    def _remember(self, key: bytes, verdict: int | str) -> None:
        self._verdicts[key] = verdict
        if len(self._verdicts) > MAX_VERDICTS:
            self._verdicts.popitem(last=False)


def _not_the_callers(error: JobError) -> Exception:
    if error.outcome is Outcome.TOO_LATE:
        return ResourceExhaustedError(
            "the server is too busy to run chat templates or compile grammars; try again later"
        )
    return InternalError(f"a worker process gave up on a request: {error}")
