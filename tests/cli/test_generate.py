"""What `generate` can ask for, and how it reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorastack.cli.generate import MAX_NEW_TOKENS
from lorastack.cli.output import shown
from lorastack.client import Client, GenerateStreamResponse
from lorastack.errors import ResourceExhaustedError
from lorastack.printable import one_line
from tests.cli.conftest import Run
from tests.service.fakes import RunningServer

SCHEMA = '{"type": "boolean"}'


@pytest.fixture
def at(fake: RunningServer) -> tuple[str, ...]:
    return "--max-new-tokens", "2", "--server", fake.address


def test_a_file_gets_escapes_that_come_in_one_part(
    run: Run, at: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a sequence is cut depends on how fast the server and its reader are."""
    parts = [GenerateStreamResponse(text="a\x1b[2Jb"), GenerateStreamResponse(final={})]
    monkeypatch.setattr(Client, "stream", lambda *_, **__: iter(parts))
    assert run("generate", "hi", *at).out == "a\x1b[2Jb\n"


def test_sampling_and_a_deadline_are_sent(
    run: Run, at: tuple[str, ...], fake: RunningServer
) -> None:
    penalties = ("--repetition-penalty", "1.5", "--frequency-penalty", "0.5")
    more = ("--presence-penalty", "-0.5", "--min-p", "0.25", "--timeout", "3600")
    done = run("generate", "hi", *penalties, *more, *at)
    assert done.code == 0, done.err
    request = fake.engine.submitted[-1]
    sampling = request.sampling
    assert (sampling.repetition_penalty, sampling.frequency_penalty) == (1.5, 0.5)
    assert (sampling.presence_penalty, sampling.min_p) == (-0.5, 0.25)
    assert request.deadline is not None
    run("generate", "hi", *at)
    assert fake.engine.submitted[-1].deadline is None


def test_a_number_of_tokens_is_set_unless_all_are_asked_for(run: Run, fake: RunningServer) -> None:
    for flags, wanted in (((), MAX_NEW_TOKENS), (("--max-new-tokens", "0"), 2048 - 3)):
        assert run("generate", "hi", *flags, "--server", fake.address).code == 0
        assert fake.engine.submitted[-1].stop.max_new_tokens == wanted


def test_structured_output_comes_from_text_or_a_file(
    run: Run, at: tuple[str, ...], fake: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA)
    for flags in (
        ("--json-schema", SCHEMA),
        ("--json-schema", str(tmp_path / "schema.json")),
        ("--regex", "a+"),
    ):
        done = run("generate", "hi", *flags, *at)
        assert done.code == 0, done.err
        assert fake.engine.submitted[-1].grammar is not None
    assert run("generate", "hi", "--regex", "a", "--json-schema", SCHEMA, *at).code == 2


def test_conversations_and_token_ids(
    run: Run, at: tuple[str, ...], fake: RunningServer, tmp_path: Path
) -> None:
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "bye")]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"role": role, "content": text} for role, text in turns]))
    assert run("generate", "--messages", str(path), *at).code == 0
    assert fake.engine.submitted[-1].prompt_ids == tuple(fake.engine.tokenizer.chat(turns))
    assert run("generate", "--token-ids", "5,6,7", *at).code == 0
    assert fake.engine.submitted[-1].prompt_ids == (5, 6, 7)
    for wrong in (
        (),
        ("hi", "--token-ids", "5"),
        ("--token-ids", "5", "--system", "x"),
        ("--messages", str(path), "--chat"),
    ):
        done = run("generate", *wrong, *at)
        assert (done.code, len(done.err.splitlines())) == (2, 1)


def test_log_probabilities_go_to_stderr(run: Run, at: tuple[str, ...]) -> None:
    done = run("generate", "hi", "--top-logprobs", "2", *at)
    first, second, _summary = done.err.splitlines()
    assert first.startswith("-0.500 '<s>' of  -1.000 ")
    assert second.startswith("-0.500 'h'")
    assert "logprob" not in run("generate", "hi", *at).err


def test_a_full_queue_is_tried_again(run: Run, at: tuple[str, ...], fake: RunningServer) -> None:
    fake.engine.refusal = ResourceExhaustedError("full", retry_after=0.01)
    assert run("generate", "hi", *at).code == 0
    assert len(fake.engine.submitted) == 1


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    assert shown("a\x1b[2Jb\n\tc\x07\x9b\r\x7fé") == "a\\x1b[2Jb\n\tc\\x07\\x9b\\r\\x7fé"
    assert one_line("a\x1b[0m\n b\u202ec\udce9") == "a\\x1b[0m b\\u202ec\\udce9"
