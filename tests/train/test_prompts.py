"""Which prompt each form of a line is, and what is refused, by its line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorastack.errors import InvalidArgumentError
from lorastack.train.prompts import Prompt, PromptFile

USER_THE_SUN = (("user", "the sun"),)


def write(path: Path, *lines: Any) -> Path:
    """Lines as they are, if they are text or bytes; others as JSON."""
    data = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else
        json.dumps(line).encode()
        for line in lines
    ]  # fmt: skip
    path.write_bytes(b"\n".join(data))
    return path


def read(path: Path) -> list[Prompt]:
    return list(PromptFile(path))


@pytest.mark.parametrize(
    ("line", "messages", "is_text"),
    [
        ({"prompt": "the sun"}, USER_THE_SUN, True),
        ({"prompt": "the sun", "completion": "shines"}, USER_THE_SUN, True),
        ({"question": "the sun", "answer": "#### 1"}, USER_THE_SUN, True),
        ({"text": "the sun"}, USER_THE_SUN, True),
        ({"category": "maths", "turns": ["the sun", "and the moon"]}, USER_THE_SUN, True),
        ('"the sun"', USER_THE_SUN, True),
        ({"instruction": "the sun", "input": "", "output": "x"}, USER_THE_SUN, True),
        ({"instruction": "Sum", "input": "1, 2"}, (("user", "Sum\n\n1, 2"),), True),
        ({"messages": [{"role": "user", "content": "the sun"}]}, USER_THE_SUN, False),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "the sun"}]}]},
            USER_THE_SUN,
            False,
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "the sun"},
                    {"from": "gpt", "value": "not what the model says"},
                ]
            },
            (("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "the sun")),
            False,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "the sun"},
                    {"role": "assistant", "content": None, "tool_calls": []},
                    {"role": "tool", "content": "not read"},
                ]
            },
            USER_THE_SUN,
            False,
        ),
    ],
)
def test_forms(tmp_path: Path, line: Any, messages: Any, is_text: bool) -> None:
    (prompt,) = read(write(tmp_path / "p.jsonl", line))
    assert prompt.messages == messages
    assert prompt.is_text is is_text


def test_forms_are_told_apart_line_by_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False).encode(),
        "",
        {"instruction": "c"},
        "   \r",
        {"conversations": [{"from": "human", "value": "d"}]},
    )
    file = PromptFile(path)
    assert file.num_prompts == 3
    found = [(prompt.number, prompt.line, prompt.messages[0][1]) for prompt in file]
    assert found == [(0, 1, "a\u2028b"), (1, 3, "c"), (2, 5, "d")]
    assert [prompt.number for prompt in file] == [0, 1, 2]  # it can be read again


def test_equal_prompts_have_one_key_whatever_their_form(tmp_path: Path) -> None:
    forms = [
        {"prompt": "a"},
        {"instruction": "a"},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    keys = [prompt.key for prompt in read(write(tmp_path / "p.jsonl", *forms, {"prompt": "b"}))]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert min(keys) >= 0 and max(keys) < 2**64


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("{", "not JSON"),
        (b'"\xff"', "not JSON"),
        ("[" * 100_000, "JSON"),
        ([1], "jq"),
        (7, "neither an object nor a string"),
        ({"prompts": "a"}, "none of the fields"),
        ({"prompt": ""}, "prompt must be a text that is not empty"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"instruction": None}, "instruction must be a text"),
        ({"turns": []}, "turns must be"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": ["a"]}, "must hold objects"),
        ({"messages": [{"role": "cat"}, {"role": "user", "content": "a"}]}, 'role "cat"'),
        ({"conversations": [{"role": "cat"}, {"role": "user", "content": "a"}]}, 'from "cat"'),
        ('{"prompt": "a \\ud800 b"}', "half a surrogate pair"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "half a surrogate pair"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "no turn of a user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no turn of a user"),
        ({"messages": [{"role": "user"}]}, "content must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "parts that are not text",
        ),
    ],
)
def test_what_is_malformed_is_named_by_its_line(tmp_path: Path, line: Any, cause: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line, {"prompt": "fine"})
    with pytest.raises(InvalidArgumentError, match=r"p\.jsonl, line 2: ") as refusal:
        PromptFile(path)
    assert cause in refusal.value.message


def test_a_list_over_many_lines_is_told_how_to_become_jsonl(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"line 1: .*jq"):
        PromptFile(write(tmp_path / "p.json", "[", '{"prompt": "a"}', "]"))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_prompts(tmp_path: Path, content: str) -> None:
    with pytest.raises(InvalidArgumentError, match="holds no prompts"):
        PromptFile(write(tmp_path / "p.jsonl", content))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        PromptFile(tmp_path / "none.jsonl")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        PromptFile(tmp_path)


def test_what_a_line_says_does_not_fill_the_screen(tmp_path: Path) -> None:
    long = {"messages": [{"role": "cat" * 9999}, {"role": "user", "content": "a"}]}
    with pytest.raises(InvalidArgumentError) as refusal:
        PromptFile(write(tmp_path / "p.jsonl", long))
    assert len(refusal.value.message) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("now", [["a", "x"], ["a"], ["a", "b", "c"], []])
def test_a_file_that_changes_after_it_was_checked(tmp_path: Path, now: list[str]) -> None:
    file = PromptFile(write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "b"}))
    write(file.path, *({"prompt": text} for text in now))
    with pytest.raises(InvalidArgumentError, match="was changed while it was read"):
        list(file)
    write(file.path, {"text": "a"}, "", {"text": "b"})  # the same prompts
    assert len(list(file)) == 2


def test_a_pipe_is_refused_before_it_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidArgumentError, match="name a file"):
        PromptFile(tmp_path / "pipe")
