"""Chat templates and grammars in real worker processes: rendered and tried as here, or refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.sandbox.pool import Pool
from lorastack.sandbox.wire import Job
from lorastack.text.grammar import JsonSchema, Regex
from tests.helpers.tiny import CHATML
from tests.sandbox.workers import CHAT, FOR_EVER, Sandbox

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
