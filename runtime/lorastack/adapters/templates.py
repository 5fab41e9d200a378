"""Whether a chat template is Jinja at all. It is parsed; running it is the renderer's affair."""

from __future__ import annotations

from jinja2 import Environment, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser

from lorastack.adapters.refusal import invalid

MAX_TEMPLATE = 64 << 10  # characters; those of well-known models have 20,000 at most


class _Generation(Extension):
    """transformers' mark around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_template(template: str, file: str) -> None:
    """Raises InvalidArgumentError naming the file of a template that is too long or not Jinja."""
    if len(template) > MAX_TEMPLATE:
        raise invalid(f"the chat template in {file} is longer than {MAX_TEMPLATE} characters")
    environment = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        environment.parse(template)
    except TemplateError as error:
        raise invalid(f"the chat template in {file} is not Jinja: {error}") from error
    except (ValueError, RecursionError, OverflowError) as error:  # a literal, or nesting
        raise invalid(f"the chat template in {file} cannot be parsed: {error}") from error
