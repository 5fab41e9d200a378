"""Progress of a server's start, on a terminal and in the log."""

from __future__ import annotations

import logging
import re

import pytest

from lorastack.cli import output


def test_bars_of_a_start_follow_each_other(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with output.startup_bars() as update:
        assert capfd.readouterr().err.strip() in ("", "\n")
        update("fetching", 1, 2)
        update("fetching", 2, 2)
        between = capfd.readouterr().err
        update("loading", 3, 4)
        update("loading", 4, 4)
        after = capfd.readouterr().err
    for label, text, size in (("fetching", between, "2/2 bytes"), ("loading", after, "4/4 bytes")):
        assert label in text and size in text
        assert (
            text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
        )  # drawn and ended, so that a log line may follow
    assert "fetching" not in after
    assert capfd.readouterr().err.strip() == ""


def test_the_log_says_now_and_then_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO):
        update = output.startup_log()
        for step in range(40):
            now = step * 0.5
            update("loading the weights", step << 28, 10 << 30)
    assert [re.sub(".*: ", "", record.getMessage()) for record in caplog.records] == [
        "2.5 GiB of 10.0 GiB",
        "5.0 GiB of 10.0 GiB",
        "7.5 GiB of 10.0 GiB",
    ]
