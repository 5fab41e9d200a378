"""The tasks of workers. A worker prepares each once, and runs every job of it in a child."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lorastack.printable import error_line
from lorastack.text.conversation import Conversation

Run = Callable[[bytes], bytes]

TEMPLATE, GRAMMAR = "template", "grammar"


class RefusalError(Exception):
    """What the caller wrote is at fault; the message says why."""


def prepare(task: str, given: Mapping[str, Any]) -> Run:
    """Loads what the jobs of a task need; `given` is what its `_prepare_` function says."""
    return _prepare_grammars(given) if task == GRAMMAR else _prepare_templates(given)


def template_body(template: str, conversation: Conversation | None) -> bytes:
    """A job of TEMPLATE, which gives the text.

    Without a conversation the template is compiled only; the job then gives the names of the
    variables that the template reads, a JSON list.
    """
    values = None if conversation is None else asdict(conversation)
    return json.dumps({"template": template, "conversation": values}).encode()


def _prepare_templates(given: Mapping[str, Any]) -> Run:
    """given["variables"]: the tokenizer's special tokens by name, which templates may use."""
    from jinja2 import meta
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        render_jinja_template,
    )

    time.tzset()  # templates may ask for the date
    render_jinja_template(conversations=[], chat_template="{{ messages }}")

    def variables_of(template: str) -> str:
        compiled: Any = _compile_jinja_template(template)
        environment = compiled.environment
        names = meta.find_undeclared_variables(environment.parse(template))
        return json.dumps(sorted(names - environment.globals.keys()))

    def rendered(template: str, wanted: dict[str, Any]) -> str:
        variables = {**given["variables"], **wanted.pop("variables")}
        texts: Any = render_jinja_template(
            conversations=[wanted.pop("messages")], chat_template=template, **wanted, **variables
        )[0]
        return str(texts[0])

    def run(body: bytes) -> bytes:
        wanted = json.loads(body)
        template, conversation = wanted["template"], wanted["conversation"]
        try:
            if conversation is None:
                text = variables_of(template)
            else:
                text = rendered(template, conversation)
        except MemoryError:
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            raise RefusalError(error_line(error)) from error
        try:
            return text.encode()
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
