"""Tool calls in what a model writes, by the syntax of its family, however the text is cut.

Known are `<tool_call>{...}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS][{...}]` and
`[TOOL_CALLS]name[ARGS]{...}` (Mistral), `<|python_tag|>{...}` and bare `{"name": ...}` (Llama 3).
A call is given once it is whole, since until then the text may turn out to be none.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from lorastack.client import Token

HERMES, HERMES_END = "<tool_call>", "</tool_call>"
MISTRAL, PYTHON = "[TOOL_CALLS]", "<|python_tag|>"
# Special tokens are missing from a reply's text; these of them are markers.
_OPENING = (HERMES, MISTRAL, PYTHON)
_INNER = ("[ARGS]", "[CALL_ID]", HERMES_END)
_ANY_OPENING = re.compile("|".join(map(re.escape, _OPENING)))
_STRUCTURE = re.compile(r'["\\{}\[\]]')
# Bare JSON may be a call while its beginning, without white space, is one of these.
_BARE_HEADS = ('{"name":', '{"type":"function"')
_NAMED_HEAD = re.compile(r"\s*([\w.\-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*")
_NAMED_HEAD_PART = re.compile(r"[\w.\-\[\]\s]*")
_MAX_HEAD = 256  # characters between [TOOL_CALLS] and the arguments
_ID_LETTERS = string.ascii_letters + string.digits


def new_id() -> str:
    """Nine letters and digits: Mistral's templates refuse other ids, no template refuses these."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function. arguments: a JSON object as text."""

    index: int
    id: str
    name: str
    arguments: str

    def message(self) -> dict[str, Any]:
        """An entry of a message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def delta(self) -> dict[str, Any]:
        """An entry of a streamed delta's `tool_calls`."""
        return {"index": self.index, **self.message()}


class ToolParser:
    """Splits one reply into content (str) and calls. Made only for requests with tools."""

    def __init__(self, names: Collection[str], make_id: Callable[[], str] = new_id) -> None:
        """names: of the given tools. Bare JSON is a call only if it names one of them."""
        self.num_calls = 0
        self._names = frozenset(names)
        self._make_id = make_id
        self._step: Callable[[], Iterator[str | ToolCall] | None] = self._start
        self._text = ""  # what no step has taken yet
        self._opened = ""  # what the text shows of the marker
        self._shown: list[str] = []  # and behind it; both become content if it is no call
        self._head = ""  # between the marker and the JSON
        self._marker = ""  # "": bare JSON
        self._json: list[str] = []
        self._balance = _Balance()

    def feed(self, text: str, tokens: Iterable[Token] = ()) -> list[str | ToolCall]:
        """The deltas that a part of the reply gives.

        text, tokens: as in GenerateStreamResponse. Markers that are special tokens are found among
        the tokens, and stand in the text where those behind them begin.
        """
        deltas: list[str | ToolCall] = []
        for piece, marker in _pieces(text, list(tokens)):
            self._text += piece
            deltas += self._run()
            if marker:
                deltas += self._special(marker)
        return _merged(deltas)

    def finish(self) -> list[str | ToolCall]:
        """The deltas that were held back, once the reply has ended."""
        deltas = self._run()
        rest = self._opened + "".join(self._shown) + self._text
        if self._step == self._after_call and not rest.strip("; \t\r\n"):
            rest = ""
        self._text = ""
        self._begin_content()
        return _merged([*deltas, rest] if rest else deltas)

    def _run(self) -> list[str | ToolCall]:
        deltas: list[str | ToolCall] = []
        while self._text:
            if (given := self._step()) is None:
                break
            deltas += given
        return deltas

    def _special(self, marker: str) -> list[str | ToolCall]:
        """A marker that the text does not show."""
        if marker in _OPENING:
            deltas = self.finish()
            self._open(marker, shown="")
            return deltas
        if self._step == self._marked and marker != HERMES_END:
            self._head += marker
        return []

    # Each step takes something from _text and returns deltas, or None to wait for more.

    def _start(self) -> Iterator[str | ToolCall] | None:
        """Before any content: white space and what may be bare JSON are held back."""
        compact = "".join(self._text[:_MAX_HEAD].split())
        if not compact:
            return None if len(self._text) < _MAX_HEAD else self._begin_content()
        for head in _BARE_HEADS:
            if compact.startswith(head):
                blank = len(self._text) - len(self._text.lstrip())
                space, self._text = self._text[:blank], self._text[blank:]
                self._open("", shown=space)
                self._step = self._in_json
                return iter(())
            if head.startswith(compact):
                return None
        if any(marker.startswith(compact[: len(marker)]) for marker in _OPENING):
            bare = self._text.lstrip()
            if _ANY_OPENING.match(bare):
                self._text = bare
            elif any(marker.startswith(bare) for marker in _OPENING):
                return None
        return self._begin_content()

    def _content(self) -> Iterator[str | ToolCall] | None:
        if found := _ANY_OPENING.search(self._text):
            content, self._text = self._text[: found.start()], self._text[found.end() :]
            self._open(found.group(), shown=found.group())
            return iter([content] if content else [])
        held = _partial(self._text, _OPENING)
        cut = len(self._text) - held
        content, self._text = self._text[:cut], self._text[cut:]
        return iter([content]) if content else None

    def _marked(self) -> Iterator[str | ToolCall] | None:
        """Behind a marker, before the JSON."""
        is_mistral = self._marker == MISTRAL
        found = re.search(r"[\[{]" if is_mistral and not self._head.strip() else "{", self._text)
        taken = self._text if found is None else self._text[: found.start()]
        if is_mistral and found and found.group() == "[" and taken.strip():
            # Behind a name: [ARGS] and [CALL_ID], up to the object.
            found = re.search("{", self._text)
            taken = self._text if found is None else self._text[: found.start()]
        head = self._head + taken
        whole = found is not None
        is_list = whole and found is not None and found.group() == "["
        if not self._may_be_head(head, whole=whole, is_list=is_list):
            # What was taken may hold the marker of a call.
            self._text = "".join(self._shown) + self._text
            self._shown = []
            return self._no_call()
        self._shown.append(taken)
        self._head, self._text = head, self._text[len(taken) :]
        if not whole:
            return None
        self._step = self._in_json
        return iter(())

    def _may_be_head(self, head: str, *, whole: bool, is_list: bool) -> bool:
        if self._marker != MISTRAL or is_list or not head.strip():
            # Only Mistral puts something between: a name before an object, nothing before a list.
            bare = not head.strip() and len(head) <= _MAX_HEAD
            return bare and not (self._marker == MISTRAL and whole and not is_list)
        pattern = _NAMED_HEAD if whole else _NAMED_HEAD_PART
        return len(head) <= _MAX_HEAD and pattern.fullmatch(head) is not None

    def _in_json(self) -> Iterator[str | ToolCall] | None:
        end = self._balance.end(self._text)
        taken = self._text if end is None else self._text[:end]
        self._text = self._text[len(taken) :]
        self._json.append(taken)
        self._shown.append(taken)
        if end is None:
            return None
        calls = self._calls()
        if not calls:
            return self._no_call()
        self._opened, self._shown, self._step = "", [], self._after_call
        return iter(calls)

    def _after_call(self) -> Iterator[str | ToolCall] | None:
        """White space, a closing marker and what separates bare calls are dropped."""
        is_bare = not self._marker
        text = self._text[:_MAX_HEAD].lstrip("; \t\r\n" if is_bare else None)
        behind = self._text[min(len(self._text), _MAX_HEAD) - len(text) :]
        if is_bare:
            compact = "".join(text.split())
            if any(compact.startswith(head) for head in _BARE_HEADS):
                self._text = behind
                self._open("", shown="")
                self._step = self._in_json
                return iter(())
            if any(head.startswith(compact) for head in _BARE_HEADS):
                return None if len(self._text) < _MAX_HEAD else self._begin_content()
        closing = (HERMES_END,) if self._marker == HERMES else ()
        for marker in (*closing, *_OPENING):
            if text.startswith(marker):
                self._text = behind[len(marker) :]
                if marker == HERMES_END:
                    self._marker = HERMES_END
                else:
                    self._open(marker, shown=marker)
                return iter(())
            if marker.startswith(text):
                return None if len(self._text) < _MAX_HEAD else self._begin_content()
        return self._begin_content()

    def _open(self, marker: str, shown: str) -> None:
        self._marker, self._head, self._json = marker, "", []
        self._opened, self._shown, self._balance = shown, [], _Balance()
        self._step = self._marked

    def _begin_content(self) -> Iterator[str | ToolCall]:
        self._opened, self._shown, self._step = "", [], self._content
        return iter(())

    def _no_call(self) -> Iterator[str | ToolCall]:
        shown = self._opened + "".join(self._shown)
        self._begin_content()
        return iter([shown] if shown else [])

    def _calls(self) -> list[ToolCall]:
        """The calls of the whole JSON; [] if it is none."""
        value = _loads("".join(self._json))
        named = _NAMED_HEAD.fullmatch(self._head) if self._marker == MISTRAL else None
        if named is not None and self._head.strip():
            value = {"name": named.group(1), "arguments": value}
        read = [_call(each) for each in (value if isinstance(value, list) else [value])]
        calls = [each for each in read if each is not None]
        if len(calls) < len(read):
            return []
        is_bare = not self._marker
        if is_bare and not all(name in self._names for name, _ in calls):
            return []
        return [self._numbered(name, arguments) for name, arguments in calls]

    def _numbered(self, name: str, arguments: str) -> ToolCall:
        self.num_calls += 1
        return ToolCall(self.num_calls - 1, self._make_id(), name, arguments)


def parse_forced(text: str, make_id: Callable[[], str] = new_id) -> list[ToolCall]:
    """The calls of a text by `lorastack.gateway.openai.forced`; [] if the text was cut short."""
    value = _loads(text)
    read = [_call(each) for each in (value if isinstance(value, list) else [value])]
    calls = [each for each in read if each is not None]
    if len(calls) < len(read):
        return []
    return [ToolCall(index, make_id(), *call) for index, call in enumerate(calls)]


class _Balance:
    """Finds where a JSON object or list ends, in time linear in the text."""

    def __init__(self) -> None:
        self._depth = self._seen = 0
        self._in_string = False
        self._escaped = -1  # position of a character behind a backslash

    def end(self, text: str) -> int | None:
        """Characters of the next part up to the end; None if it goes on."""
        for found in _STRUCTURE.finditer(text):
            position, char = self._seen + found.start(), found.group()
            if position == self._escaped:
                continue
            if self._in_string:
                if char == "\\":
                    self._escaped = position + 1
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return found.end()
        self._seen += len(text)
        return None


def _pieces(text: str, tokens: list[Token]) -> Iterator[tuple[str, str]]:
    """The text cut at special tokens that are markers: (text, the marker behind it or "")."""
    for index, token in enumerate(tokens):
        marker = token.text.strip()
        if not token.special or marker not in (*_OPENING, *_INNER):
            continue
        behind = "".join(each.text for each in tokens[index + 1 :] if not each.special)
        before = "".join(each.text for each in tokens[:index] if not each.special)
        if text.endswith(behind):
            cut = len(text) - len(behind)
        else:
            cut = len(before) if text.startswith(before) else 0
        yield text[:cut], marker
        yield from _pieces(text[cut:], tokens[index + 1 :])
        return
    yield text, ""


def _partial(text: str, markers: Iterable[str]) -> int:
    """Characters at the end that may begin a marker."""
    longest = max(map(len, markers))
    for length in range(min(len(text), longest - 1), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0


def _call(value: Any) -> tuple[str, str] | None:
    """(name, arguments) of a call; None if it is none."""
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        name.encode()
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        return None
    except (ValueError, RecursionError):
        return None
    return name, text


def _loads(text: str) -> Any:
    """JSON's value; None for what is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _merged(deltas: list[str | ToolCall]) -> list[str | ToolCall]:
    """Neighbouring content joined."""
    merged: list[str | ToolCall] = []
    for delta in deltas:
        if isinstance(delta, str) and merged and isinstance(merged[-1], str):
            merged[-1] += delta
        elif delta:
            merged.append(delta)
    return merged
