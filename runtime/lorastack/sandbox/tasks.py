"""The tasks of workers. A worker prepares each once, and runs every job of it in a child."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from lorastack.printable import error_line

Run = Callable[[bytes], bytes]

TEMPLATE, GRAMMAR = "template", "grammar"


class RefusalError(Exception):
    """What the caller wrote is at fault; the message says why."""


def prepare(task: str, given: Mapping[str, Any]) -> Run:
    """Loads what the jobs of a task need; `given` is what its `_prepare_` function says."""
    return _prepare_grammars(given) if task == GRAMMAR else _prepare_templates(given)


def template_body(template: str, messages: tuple[tuple[str, str], ...] | None) -> bytes:
    """A job of TEMPLATE. messages: (role, content) each; None: the template is compiled only."""
    return json.dumps({"template": template, "messages": messages}).encode()


def _prepare_templates(given: Mapping[str, Any]) -> Run:
    """given["variables"]: the tokenizer's special tokens by name, which templates may use."""
    from transformers.utils.chat_template_utils import render_jinja_template

    time.tzset()  # templates may ask for the date
    render_jinja_template(conversations=[], chat_template="{{ messages }}")

    def run(body: bytes) -> bytes:
        wanted = json.loads(body)
        messages = wanted["messages"]
        chats = [] if messages is None else [[{"role": r, "content": c} for r, c in messages]]
        try:
            texts: list[str] = render_jinja_template(  # type: ignore[assignment]
                conversations=chats,
                chat_template=wanted["template"],
                add_generation_prompt=True,
                **given["variables"],
            )[0]
        except MemoryError:
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            raise RefusalError(error_line(error)) from error
        try:
            return str("".join(texts)).encode()
        except UnicodeEncodeError as error:
            raise RefusalError("it gives half a surrogate pair, which is no text") from error

    return run


def _prepare_grammars(given: Mapping[str, Any]) -> Run:
    """given: what `GrammarCompiler.trial_setup` gives."""
    from lorastack.text import trial

    vocabulary = trial.vocabulary_of(given)

    def run(body: bytes) -> bytes:
        num_bytes, cause = trial.run(body, vocabulary)
        if cause:
            raise RefusalError(cause)
        return str(num_bytes).encode()

    return run
