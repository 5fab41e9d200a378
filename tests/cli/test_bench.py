"""`lorastack bench`: what it sends, and its arithmetic."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorastack.cli.bench import summarise
from lorastack.client import Client, GenerateRequest, StopParams
from lorastack.client.traffic import Outcome, percentile, send
from tests.cli.conftest import Run
from tests.service.fake_engine import PATIENCE
from tests.service.fakes import MAX_CONTEXT, RunningServer


@pytest.fixture
def at(fake: RunningServer) -> tuple[str, str]:
    return "--server", fake.address


def test_every_concurrency_is_a_row(run: Run, at: tuple[str, str], fake: RunningServer) -> None:
    options = ("--requests", "3", "--prompt-tokens", "9", "--max-new-tokens", "4")
    done = run("bench", "--concurrency", "1,4", *options, "--json", *at)
    assert done.code == 0, done.err
    reply = json.loads(done.out)
    assert (reply["backend"], reply["dtype"]) == ("fake", "float32")
    first, second = reply["rows"]
    assert (first["concurrency"], first["requests"]) == (1, 3)
    assert (second["concurrency"], second["requests"]) == (4, 4)  # as many as run at once
    assert first["tokens_per_second"] > 0
    assert first["tokens_per_step"] == 0.75  # three tokens after the prompt's; it counts 4 steps
    _, *measured = fake.engine.submitted
    assert len(measured) == 3 + 4
    prompts = {request.prompt_ids for request in measured}
    assert len(prompts) == 7  # none finds another's in the cache
    assert {len(prompt) for prompt in prompts} == {9}
    assert all(request.stop.max_new_tokens == 4 for request in measured)
    assert all(request.stop.ignore_eos and request.speculation.enabled for request in measured)


def test_loras_take_turns_and_options_are_sent(
    run: Run, at: tuple[str, str], fake: RunningServer, folders: dict[str, Path]
) -> None:
    for name in ("lora", "other", "heads"):
        assert run("adapters", "upload", str(folders[name]), "--id", name, *at).code == 0
    one = ("bench", "--concurrency", "1")
    loras = ("--lora", "lora", "--lora", "other")
    done = run(*one, "--requests", "4", *loras, "--speculation", "off", *at)
    assert done.code == 0, done.err
    _, *measured = fake.engine.submitted  # the first one warms up
    assert [use.lora_id for request in measured for use in request.loras] == [
        "other", "lora", "other", "lora",
    ]  # fmt: skip
    assert not any(request.speculation.enabled for request in measured)
    assert run(*one, "--requests", "1", "--medusa", "heads", *at).code == 0
    last = fake.engine.submitted[-1]
    assert last.heads and last.heads.medusa_id == "heads"


def test_prompts_of_a_file_are_chats(
    run: Run, at: tuple[str, str], fake: RunningServer, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    done = run("bench", "--prompts", str(path), "--concurrency", "2", "--requests", "3", *at)
    assert done.code == 0, done.err
    chats = [tuple(fake.engine.tokenizer.chat([("user", text)])) for text in ("one", "two")]
    assert {request.prompt_ids for request in fake.engine.submitted} == set(chats)


def test_a_file_of_prompts_fits_a_context_that_made_up_ones_would_not(
    run: Run, at: tuple[str, str], fake: RunningServer, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n')
    one = ("bench", "--concurrency", "1", "--requests", "1", "--max-new-tokens", "1", *at)
    length = ("--prompt-tokens", str(MAX_CONTEXT))
    assert run(*one, *length, "--prompts", str(path)).code == 0
    refused = run(*one, *length)
    assert refused.code == 1 and "--prompt-tokens" in refused.err


@pytest.mark.parametrize(("lines", "words"), [("", "empty"), ('{"text": "x"}\n', "prompt")])
def test_bad_prompt_files_are_refused(
    run: Run, at: tuple[str, str], tmp_path: Path, lines: str, words: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(lines)
    done = run("bench", "--prompts", str(path), *at)
    assert done.code == 2
    assert words in done.err


@pytest.mark.parametrize("levels", ["", "0", "1,x"])
def test_bad_concurrency_is_refused(run: Run, at: tuple[str, str], levels: str) -> None:
    done = run("bench", "--concurrency", levels, *at)
    assert done.code == 2
    assert "1,8,32" in done.err


def test_outcomes_keep_the_order_of_requests(client: Client) -> None:
    requests = [
        GenerateRequest(prompt="hello", stop=StopParams(max_new_tokens=count))
        for count in (5, 1, 3)
    ]
    outcomes = send(client, requests, 2)
    assert [outcome.tokens for outcome in outcomes] == [5, 1, 3]
    assert all(outcome.first_token > 0 for outcome in outcomes)


def test_ctrl_c_that_wakes_nobody_is_seen(client: Client, fake: RunningServer) -> None:
    """The signal goes to another thread, as one that comes just before the wait begins does."""
    fake.engine.hold(1)
    seen = threading.Event()

    def interrupt() -> bool:
        with fake.engine.changed:
            assert fake.engine.changed.wait_for(lambda: fake.engine.submitted, PATIENCE)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        in_time = seen.wait(PATIENCE)
        fake.engine.go_on()
        return in_time

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            in_time = pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                send(client, [GenerateRequest(prompt="hello")], 1)
            seen.set()
            assert in_time.result()
    finally:
        signal.signal(signal.SIGINT, before)


def test_summary_is_of_all_outcomes() -> None:
    outcomes = [
        Outcome(sent=10.0, arrivals=((10.1, 1), (10.2, 2), (10.5, 1)), steps=2),
        Outcome(sent=10.0, arrivals=((10.3, 1), (11.0, 1)), steps=1),
    ]
    row = summarise(2, outcomes)
    assert row["tokens_per_second"] == 6.0  # six in one second
    assert (row["first_token_ms_median"], row["first_token_ms_p99"]) == (200.0, 300.0)
    assert (row["gap_ms_median"], row["gap_ms_p99"]) == (300.0, 700.0)
    assert row["tokens_per_step"] == 1.33  # four after the prompts' own, in three steps
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
