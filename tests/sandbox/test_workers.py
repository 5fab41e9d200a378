"""Chat templates and grammars in real worker processes: rendered and tried as here, or refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from transformers import AutoTokenizer

from lorastack.errors import InvalidArgumentError, Reason, UnavailableError
from lorastack.sandbox.pool import JobError, Pool
from lorastack.sandbox.tasks import TEMPLATE, template_body
from lorastack.sandbox.wire import Job, Limits, Outcome
from lorastack.service.calls.call import Chat
from lorastack.service.calls.untrusted import GRAMMAR_LIMITS, TEMPLATE_LIMITS, Untrusted
from lorastack.text.conversation import Conversation
from lorastack.text.grammar import GrammarCompiler, JsonSchema, Regex
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.tiny import CHATML

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


@pytest.fixture(scope="module")
def sandbox(tiny_llama: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(tiny_llama)
    with sandbox.runner:
        yield sandbox
        sandbox.run(sandbox.untrusted.close())


TEMPLATES = {
    "chatml": CHATML,
    "trimmed": "{% for m in messages %}\n  {%- if m.role == 'user' %}\n[INST] {{ m.content | trim }"
    "} [/INST]\n  {%- else %}{{ m.content }}{{ eos_token }}{% endif %}\n{% endfor %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% endif %}{% for m in loop_messages %}"
    "{% if loop.index0 == 0 %}{{ bos_token + '[INST] <<SYS>>' + system + '<</SYS>>' }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
    "{% endif %}{{ m['content'] }}{% if loop.index0 > 1 %}{% continue %}{% endif %}.{% endfor %}",
    "tools": "{{ tools is defined and tools is none }}{{ messages | tojson }}{% generation %}g"
    "{% endgeneration %}{{ strftime_now('%Y')[:2] }}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "macros": "{% macro turn(m) %}<{{ m.role | upper }}>{{ m.content | e }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{{ undefined_thing }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_worker_renders_what_transformers_does(
    sandbox: Sandbox, tiny_llama: Path, name: str
) -> None:
    hf = AutoTokenizer.from_pretrained(tiny_llama)
    chat = [{"role": role, "content": content} for role, content in CHAT]
    wanted = hf.apply_chat_template(
        chat, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
    )
    assert sandbox.render(TEMPLATES[name]) == wanted


def test_a_large_chat_goes_there_and_back(sandbox: Sandbox) -> None:
    chat = tuple(("user", f"{i} " + "é" * 40) for i in range(900))
    assert sandbox.render("{{ messages | map(attribute='content') | join }}", chat) == "".join(
        content for _, content in chat
    )


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ 9**(9**(9)) }}", "processor time"),
        (FOR_EVER, "processor time"),
        ("{% for i in range(9999) %}{{ range(9999) | list | sort | length }}{% endfor %}", "time"),
        ("{{ ('a' * 10**10) | length }}", "memory"),
        ("{{ 'a'.ljust(10**10) }}", "memory"),
        ("{{ '%999999999d' | format(1) }}", "memory"),
        ("{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
         "{% endfor %}{{ ns.s }}", "takes more than"),
        ("{{ [[]] * 10**9 }}", "memory"),
        ("{{ 'a' * 100001 }}", "100000 bytes"),
        ("{% for i in range(9999) %}{{ 'some text that is small' }}{% endfor %}", "100000 bytes"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
        ("{% if %}", "refused"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[9]['role'] }}", "refused"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ '\\ud800' }}", "surrogate"),
        ("{{ raise_exception('\\ud800' * 999999) }}", "refused"),
        ("{% include 'x' %}", "refused"),
    ],
    ids=lambda value: value[:24],
)  # fmt: skip
def test_a_template_that_takes_too_much_or_fails_is_the_callers_error(
    sandbox: Sandbox, template: str, cause: str
) -> None:
    with pytest.raises(InvalidArgumentError, match="chat template") as refusal:
        sandbox.render(template)
    assert cause in refusal.value.message
    assert len(refusal.value.message) < 500
    assert "\n" not in refusal.value.message
    refusal.value.message.encode()
    assert sandbox.render("{{ messages[1].content }}") == "hi é 😀"


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("{% for m in messages %}", "endfor"),
    ],
)
def test_what_does_not_compile_is_found_without_a_chat(
    sandbox: Sandbox, template: str, cause: str
) -> None:
    async def check(template: str) -> None:
        sandbox.untrusted.attach(asyncio.get_running_loop())
        await asyncio.to_thread(sandbox.untrusted.check_template, template)

    for fine in ("{{ messages[99].content }}" + FOR_EVER, "{{ 9**9**9**9 }}", CHATML):
        sandbox.run(check(fine))  # it is compiled only: a chat with it would fail
    with pytest.raises(InvalidArgumentError, match="cannot be compiled") as refusal:
        sandbox.run(check(template))
    assert refusal.value.reason is Reason.INVALID_ADAPTER
    assert cause in refusal.value.message


def schema(value: object) -> JsonSchema:
    return JsonSchema(json.dumps(value))


FIELDS: dict[str, object] = {"type": "object", "additionalProperties": False}
REALISTIC: dict[str, JsonSchema | Regex] = {
    "optional": schema({**FIELDS, "properties": {f"field_{i}": {} for i in range(200)}}),
    "enum": schema({"enum": [f"value number {i}" for i in range(1000)]}),
    "formats": schema(
        {
            **FIELDS,
            "properties": {
                name: {"type": "string", "format": name}
                for name in ("date", "time", "date-time", "email", "uuid", "ipv4", "uri")
            },
            "required": ["date-time", "email", "uuid"],
        }
    ),
    "nested": schema(
        {
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "value": {"type": "integer"},
                        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["value"],
                }
            },
            "$ref": "#/$defs/node",
        }
    ),
    "choices": schema(
        {
            "type": "array",
            "minItems": 1,
            "maxItems": 50,
            "items": {
                "anyOf": [
                    {**FIELDS, "properties": {f"p{i}": {"type": "number"}}, "required": [f"p{i}"]}
                    for i in range(20)
                ]
            },
        }
    ),
    "pattern": schema({"type": "string", "pattern": r"^[\w.+-]+@[\w-]+(\.[\w-]+)+$"}),
    "bounds": schema({"type": "integer", "minimum": -1000, "maximum": 99999, "multipleOf": 5}),
    "words": Regex(r"(\w{1,30} ){1,50}\w+\."),
    "letters": Regex(r"\p{L}{3,40}( \p{L}{3,40}){0,9}"),
    "alternatives": Regex("|".join(f"word{i}" for i in range(800))),
}


@pytest.mark.parametrize("name", REALISTIC)
def test_realistic_grammars_pass_their_trial(sandbox: Sandbox, name: str) -> None:
    assert 0 <= sandbox.admit(REALISTIC[name]) < 64 << 20


HOSTILE: dict[str, tuple[JsonSchema | Regex, str]] = {
    "bounds beyond int64": (
        schema({"type": "integer", "minimum": -1e20, "maximum": -1e20}),
        "too complex",
    ),
    "the smallest int64": (
        schema({"type": "integer", "minimum": -(1 << 63), "maximum": -(1 << 63)}),
        "too complex",
    ),
    "exclusive bounds": (
        schema({"items": {"type": "integer", "exclusiveMaximum": -1e19, "minimum": -1e20}}),
        "too complex",
    ),
    "a prime": (schema({"type": "integer", "multipleOf": 9_999_991}), "too long"),
    "two primes": (
        schema({"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}),
        "too long",
    ),
    "nested repeats": (Regex("((a{1000}){1000}){1000}"), "masks take too long"),
    "nested repeats later": (Regex("b{3}((a{1000}){1000}){1000}"), "masks take too long"),
    "classes": (Regex(r"[\p{L}\p{N}\p{S}]{1,100}" * 40), "too complex"),
    "a cycle": (
        schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#"}}}),
        "no text",
    ),
    "3,000 properties": (
        schema({"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}),
        "",
    ),
    "not JSON": (JsonSchema("{" * 65_000), "line 1 column 2"),
    "a mistake at the end": (Regex("a|" * 4000 + "(b"), "character 8001"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_grammar_that_takes_too_much_is_refused_and_remembered(
    sandbox: Sandbox, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, cause = HOSTILE[name]
    with pytest.raises(InvalidArgumentError) as refusal:
        sandbox.admit(wanted)
    assert refusal.value.reason is Reason.INVALID_GRAMMAR
    assert refusal.value.message.count(wanted.field) == 1
    assert cause in refusal.value.message
    monkeypatch.setattr(Pool, "run", None)
    with pytest.raises(InvalidArgumentError) as again:
        sandbox.admit(wanted)
    assert again.value.message == refusal.value.message


def test_the_same_grammar_asked_for_by_many_is_tried_by_few(sandbox: Sandbox) -> None:
    started: list[object] = []
    serve = Pool._serve

    async def counted(pool: Pool, seat: Any, job: Job) -> bytes:
        started.append(job)
        return await serve(pool, seat, job)

    async def ask() -> list[int]:
        return await asyncio.gather(
            *(sandbox.untrusted.admit(Regex("the same"), "caller") for _ in range(20))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "_serve", counted)
        assert len(set(sandbox.run(ask()))) <= 2
    assert len(started) <= 2  # as many as there are workers


async def started(pool: Pool, num_jobs: int) -> None:
    """Waits until `num_jobs` children run."""
    while sum(len(psutil.Process(pid).children()) for pid in pool.pids) < num_jobs:
        await asyncio.sleep(0.001)


def endless() -> Job:
    limits = Limits(cpu=1000, wall=1000, memory=1 << 28, output=100)
    return Job(
        task=TEMPLATE, body=template_body(FOR_EVER, Conversation([], None, {})), limits=limits
    )


def test_whoever_gives_up_frees_the_worker(sandbox: Sandbox) -> None:
    pool = sandbox.untrusted.pool

    async def check() -> None:
        jobs = [asyncio.create_task(pool.run(endless(), "caller")) for _ in range(4)]
        await started(pool, 2)
        children = [child for pid in pool.pids for child in psutil.Process(pid).children()]
        assert pool.num_waiting == 2
        for job in jobs:
            job.cancel()
        await asyncio.wait(jobs)
        assert pool.num_waiting == 0
        # The workers serve the next caller, and none was replaced.
        pids = pool.pids
        texts = [sandbox.untrusted.render("x", Chat(CHAT), "caller") for _ in range(4)]
        assert await asyncio.gather(*texts) == ["x"] * 4
        assert pool.pids == pids
        assert pool.num_running == 0
        assert not any(child.is_running() for child in children)

    sandbox.run(check())


def test_a_worker_that_dies_is_replaced(sandbox: Sandbox) -> None:
    pool = sandbox.untrusted.pool

    async def kill_all() -> list[psutil.Process]:
        """Waits for a child, kills all workers and returns their children."""
        await started(pool, 1)
        workers = [psutil.Process(pid) for pid in pool.pids]
        children = [child for worker in workers for child in worker.children()]
        for worker in workers:
            worker.kill()
        return children

    async def check() -> None:
        job = asyncio.create_task(pool.run(endless(), "caller"))
        children = await kill_all()
        # A job is tried once more; no caller hears of a worker that died idle.
        texts = [sandbox.untrusted.render("x", Chat(CHAT), "caller") for _ in range(3)]
        assert await asyncio.gather(*texts) == ["x"] * 3
        children += await kill_all()
        with pytest.raises(UnavailableError) as lost:
            await job
        assert lost.value.reason is Reason.WORKER_ENDED
        assert await sandbox.untrusted.render("x", Chat(CHAT), "caller") == "x"
        while any(child.is_running() for child in children):
            await asyncio.sleep(0.001)

    sandbox.run(check())


def test_a_job_that_gets_no_processor_is_not_the_callers_fault(sandbox: Sandbox) -> None:
    job = replace(endless(), limits=replace(endless().limits, wall=0.01))
    with pytest.raises(JobError) as late:
        sandbox.run(sandbox.untrusted.pool.run(job, "caller"))
    assert late.value.outcome is Outcome.TOO_LATE


def test_closing_while_a_worker_is_told_its_task() -> None:
    """Every caller hears that the server ends, and nothing else."""
    asked, go_on = threading.Event(), threading.Event()

    def setup() -> dict[str, object]:
        asked.set()
        assert go_on.wait(PATIENCE)
        return {"variables": {}}

    async def check() -> None:
        pool = Pool({TEMPLATE: setup}, num_workers=1)
        job = Job(task=TEMPLATE, body=template_body("", None), limits=TEMPLATE_LIMITS)
        running = asyncio.create_task(pool.run(job, "caller"))
        assert await asyncio.to_thread(asked.wait, PATIENCE)
        closing = asyncio.create_task(pool.close())
        while not pool._closed:
            await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(UnavailableError):
            await running
        await closing
        assert pool.pids == []

    asyncio.run(asyncio.wait_for(check(), PATIENCE))


def test_closing_ends_the_workers_and_whoever_waits() -> None:
    async def check() -> None:
        pool = Pool({TEMPLATE: lambda: {"variables": {}}}, num_workers=1)
        jobs = [asyncio.create_task(pool.run(endless(), "caller")) for _ in range(2)]
        await started(pool, 1)
        (worker,) = map(psutil.Process, pool.pids)
        (child,) = worker.children()
        await pool.close()
        for job in jobs:
            with pytest.raises(UnavailableError):
                await job
        with pytest.raises(UnavailableError):
            await pool.run(endless(), "caller")
        assert not worker.is_running()
        while child.is_running():
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(check(), PATIENCE))


SERVER = """
import asyncio, sys
from lorastack.sandbox.pool import Pool
from lorastack.sandbox.tasks import TEMPLATE
from tests.sandbox.test_workers import endless, started

async def main():
    pool = Pool({TEMPLATE: lambda: {"variables": {}}}, num_workers=1)
    job = asyncio.create_task(pool.run(endless(), "caller"))
    await started(pool, 1)
    print(pool.pids[0], flush=True)
    await job

asyncio.run(main())
"""


def test_workers_end_with_a_server_that_is_killed() -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    with server:
        assert server.stdout is not None
        worker = psutil.Process(int(server.stdout.readline()))
        (child,) = worker.children()
        server.kill()
    _, alive = psutil.wait_procs([worker, child], timeout=PATIENCE)
    assert not alive
