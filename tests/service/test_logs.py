"""A record is one line whatever a caller put into it, and each call says who did what."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path

import grpc
import pytest

from lorastack.client import Client
from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.service.edge import status
from lorastack.service.edge.status import CallGuard, to_status
from lorastack.service.watch.logs import JsonFormatter, TextFormatter
from lorastack.v1 import generation_pb2 as pb
from tests.service.fakes import RunningServer

FORGED = "2026-01-01 00:00:00,000 INFO lorastack: all is well"
HOSTILE = f"x\n{FORGED}\r\x1b[2J\u2028\u202e\x85\ud800\x00"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_a_record_is_one_line_and_no_command(formatter: logging.Formatter) -> None:
    """Its traceback aside, which is indented."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    logger = logging.Logger("test")
    logger.addHandler(handler := logging.StreamHandler(stream))
    handler.setFormatter(formatter)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("about %s", HOSTILE, extra={"adapter": HOSTILE, "key": [HOSTILE]})
    stream.flush()
    text = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    first, *rest = text.removesuffix("\n").split("\n")
    assert all(line.startswith("  ") for line in rest)
    assert "\\n" in first
    assert not [char for char in text if char != "\n" and not char.isprintable()]
    if isinstance(formatter, JsonFormatter):
        assert rest == []
        line = json.loads(first)
        assert line["adapter"] == HOSTILE
        assert HOSTILE in line["exception"]


def test_a_status_takes_any_text() -> None:
    error = InvalidArgumentError(HOSTILE, field=HOSTILE, adapter_id="\udfff" * 9)
    message = to_status(error, "id").message
    assert message.startswith(f"x\\n{FORGED}\\r\\x1b[2J\\u2028")
    assert message.isprintable()
    assert message.endswith("\\ud800\\x00")


def test_a_refusal_of_any_text_reaches_the_caller(fake: RunningServer, client: Client) -> None:
    fake.engine.failure = InvalidArgumentError(HOSTILE)
    with pytest.raises(InvalidArgumentError) as refusal:
        client.generate(pb.GenerateRequest(prompt="a"))
    assert "\\ud800" in refusal.value.message


def test_what_changes_something_leaves_a_line(
    client: Client, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = client.upload(folders["lora"], "x")
    client.upload(folders["other"], "x")
    client.rollback("x", first.digest)
    client.upload(folders["heads"], "heads")
    client.set_default_medusa("heads")
    client.load("x", pin=True)
    client.generate(
        pb.GenerateRequest(prompt="a", lora_id="x", stop=pb.StopParams(max_new_tokens=5))
    )
    client.unload("x")
    client.download("x", tmp_path / "copy")
    client.set_default_medusa("")
    client.delete_adapter("x")
    with pytest.raises(NotFoundError):
        client.get_adapter("x\n" + FORGED)
    lines = [record for record in caplog.records if hasattr(record, "rpc")]
    assert [record.getMessage() for record in lines[:-1]] == [
        f"{rpc} OK"
        for rpc in (
            *("UploadAdapter", "UploadAdapter", "RollbackAdapter", "UploadAdapter"),
            *("SetDefaultMedusa", "LoadAdapter", "Generate", "UnloadAdapter", "DownloadAdapter"),
            *("SetDefaultMedusa", "DeleteAdapter"),
        )
    ]
    assert lines[-1].getMessage().startswith("GetAdapter NOT_FOUND: ADAPTER_NOT_FOUND: ")
    fields = [vars(record) for record in lines]
    assert all(each["peer"].startswith("ipv") and each["request_id"] for each in fields)
    assert [each.get("adapter", "-").partition("@")[0] for each in fields] == [
        *("x", "x", "x", "heads", "heads", "x", "-", "x", "x", "", "x", "-")
    ]
    assert {each["digest"] for each in fields[2:3]} == {first.digest}
    generated = fields[6]
    assert (generated["loras"], generated["heads"], generated["tokens"]) == ("x", "heads", 5)
    assert generated["ms"] >= 0


class Caller:
    def peer(self) -> str:
        return "ipv4:1.2.3.4:5"

    async def abort(self, *status: object) -> None:
        raise grpc.aio.AbortError


def test_refusals_do_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So many lines a second; the rest is counted. What succeeds or fails for us has its line."""
    now = 5.0
    monkeypatch.setattr(status.time, "monotonic", lambda: now)
    monkeypatch.setattr(status, "MAX_REFUSALS", 3)
    caplog.set_level(logging.INFO)
    guard = CallGuard(lambda rpc, code: None)

    async def refuse(error: Exception) -> None:
        with pytest.raises(grpc.aio.AbortError):
            async with guard("Generate", Caller(), "id"):  # type: ignore[arg-type]
                raise error

    async def refuse_many() -> None:
        nonlocal now
        for _ in range(10):
            await refuse(InvalidArgumentError("x" * 9000))
        await refuse(RuntimeError("a bug"))
        now += 1.0
        await refuse(InvalidArgumentError("again"))

    asyncio.run(refuse_many())
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO"] * 3 + ["ERROR", "WARNING", "INFO"]
    assert "7 more" in caplog.records[4].getMessage()
    assert all(len(record.getMessage()) < 1200 for record in caplog.records)
