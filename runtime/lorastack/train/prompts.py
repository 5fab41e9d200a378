"""Prompts of a JSONL file, whatever of the usual forms each line has.

    {"conversations": [{"from": "human", "value": ...}, ...]}   ShareGPT
    {"messages": [{"role": "user", "content": ...}, ...]}       OpenAI
    {"instruction": ..., "input": ...}                          Alpaca
    {"prompt": ...}, {"question": ...}, {"text": ...}, or a string alone
    {"turns": [...]}                                            MT-Bench: its first turn

A prompt ends with the last turn of a user. Answers are the model's own: what a file says behind
that turn is not read, and assistant turns before it are context, as the file has them.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from lorastack.errors import InvalidArgumentError
from lorastack.modelfiles import shown

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_ROLES = {
    "system": SYSTEM,
    "developer": SYSTEM,
    "user": USER,
    "human": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
}

_HALF_PAIR = re.compile("[\ud800-\udfff]")

Messages = tuple[tuple[str, str], ...]  # (role, content) of each


@dataclass(frozen=True)
class Prompt:
    """What a model shall answer. number: among the file's prompts, from 0; line: in it, from 1.

    messages: the last one is a user's. is_text: it is a text or an instruction alone, which a model
    without a chat template goes on with.
    """

    number: int
    line: int
    messages: Messages
    is_text: bool

    @cached_property
    def key(self) -> int:
        """The same for equal prompts, different for others: 64 bits of a hash of the messages."""
        text = json.dumps(self.messages, ensure_ascii=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


class PromptFile:
    """A file of prompts. All of it is checked when it is opened; only the prompts' keys are kept.

    num_prompts: lines that are not empty. sha256: of the file, lower-case hex.
    """

    def __init__(self, path: Path) -> None:
        """Raises InvalidArgumentError: no such file, no prompt in it, or a malformed line, which
        the message names by its number."""
        self.path = path
        sha256 = hashlib.sha256()
        self._keys = array("Q", (prompt.key for prompt in self._read(sha256.update)))
        self.num_prompts = len(self._keys)
        self.sha256 = sha256.hexdigest()
        if not self.num_prompts:
            raise InvalidArgumentError(f"{path} holds no prompts: write one JSON object a line")

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts in their order, read as they are asked for.

        Raises InvalidArgumentError where they are not those of the opening any more.
        """
        for prompt, key in zip_longest(self._read(lambda data: None), self._keys):
            if prompt is None or prompt.key != key:
                raise InvalidArgumentError(
                    f"{self.path} was changed while it was read: run the command again, and leave "
                    "the file as it is meanwhile"
                )
            yield prompt

    def _read(self, see: Callable[[bytes], None]) -> Iterator[Prompt]:
        number = 0
        with _opened(self.path) as file:
            for line, data in enumerate(file, start=1):  # ends of lines in bytes are \n alone
                see(data)
                if data.strip():
                    yield _prompt(f"{self.path}, line {line}", data, number, line)
                    number += 1


def _opened(path: Path) -> BinaryIO:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InvalidArgumentError(
                f"{path} is a pipe or device, but prompts are read more than once: name a file"
            )
        return path.open("rb")
    except OSError as error:
        raise InvalidArgumentError(
            f"{path} cannot be read ({error.strerror}): name a JSONL file of prompts"
        ) from error


def _prompt(where: str, data: bytes, number: int, line: int) -> Prompt:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if line == 1 and data.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            _refuse(where, "it begins a JSON list; JSONL has one object a line: jq -c '.[]' FILE")
        _refuse(where, f"it is not JSON ({error}); JSONL has one object a line")
    if isinstance(value, list):
        _refuse(where, "it is a JSON list; JSONL has one object a line: jq -c '.[]' FILE")
    messages, is_text = _messages(where, value)
    return Prompt(number, line, messages, is_text)


def _messages(where: str, value: Any) -> tuple[Messages, bool]:
    """The messages up to the last user turn; True if they are one text."""
    if isinstance(value, str):
        return _single(where, "the line", value), True
    if not isinstance(value, dict):
        _refuse(where, "it is neither an object nor a string")
    for field, role, content in (
        ("conversations", "from", "value"),
        ("messages", "role", "content"),
    ):
        if field in value:
            return _conversation(where, field, value[field], role, content), False
    if "instruction" in value:
        parts = [_text(where, "instruction", value["instruction"])]
        if value.get("input"):
            parts.append(_text(where, "input", value["input"]))
        return ((USER, "\n\n".join(parts)),), True
    for field in ("prompt", "question", "text"):
        if field in value:
            return _single(where, field, value[field]), True
    if "turns" in value:
        turns = value["turns"]
        if not isinstance(turns, list) or not turns:
            _refuse(where, "turns must be a list of texts")
        return _single(where, "turns", turns[0]), True
    _refuse(
        where,
        "it has none of the fields conversations, messages, instruction, prompt, question, text "
        "and turns",
    )


def _single(where: str, field: str, value: object) -> Messages:
    return ((USER, _text(where, field, value)),)


def _conversation(where: str, field: str, turns: Any, role: str, content: str) -> Messages:
    if not isinstance(turns, list):
        _refuse(where, f"{field} must be a list of messages")
    if not all(isinstance(turn, dict) for turn in turns):
        _refuse(where, f"{field} must hold objects with {role} and {content}")
    stated = [turn.get(role, turn.get("role")) for turn in turns]
    roles = [_ROLES.get(each, "") if isinstance(each, str) else "" for each in stated]
    if USER not in roles:
        _refuse(where, f"{field} has no turn of a user, to which a model could answer")
    count = len(roles) - roles[::-1].index(USER)
    if "" in roles[:count]:
        found, known = shown(stated[roles.index("")]), ", ".join(sorted(_ROLES))
        _refuse(where, f"a message of {field} has the {role} {found}; known are {known}")
    texts = [turn.get(content, turn.get("content")) for turn in turns[:count]]
    return tuple(
        (speaker, _content(where, content, text))
        for speaker, text in zip(roles[:count], texts, strict=True)
    )


def _content(where: str, field: str, value: Any) -> str:
    """A message's text; OpenAI's form may cut it into parts."""
    if isinstance(value, list):
        texts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            for part in value
        ]
        if not texts or None in texts:
            _refuse(where, f"{field} has parts that are not text; leave the line out")
        return "".join(_text(where, field, text, empty=True) for text in texts)
    return _text(where, field, value, empty=True)


def _text(where: str, field: str, value: object, *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (value or empty):
        _refuse(where, f"{field} must be a text" + ("" if empty else " that is not empty"))
    if _HALF_PAIR.search(value):
        _refuse(where, f"{field} holds half a surrogate pair, which is no character")
    return value


def _refuse(where: str, cause: str) -> NoReturn:
    raise InvalidArgumentError(f"{where}: {cause}")
