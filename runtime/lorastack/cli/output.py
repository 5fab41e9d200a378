"""What commands print: text for people, JSON for machines."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from lorastack.config import GIB, KIB, MIB, TIB
from lorastack.printable import one_line, printable, printable_json

if TYPE_CHECKING:  # they import torch
    from lorastack.startup.model import StartupProgress
    from lorastack.train.progress import Progress as StageProgress

NEWS_SECONDS = 5.0  # between two log lines of a server's start
STAGE_SECONDS = 15.0  # the same of a stage of training, which may take hours

_WIDE = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)

logger = logging.getLogger(__name__)


def print_json(value: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    typer.echo(printable_json(json.dumps(value, indent=2, ensure_ascii=False)))


def shown(text: str) -> str:
    """Generated text for a terminal: its lines and tabs as they are, control characters escaped."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: printable(match[0]), text)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, numbers to the right. Never cut: a terminal wraps what is too wide."""
    cells = [[one_line(str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    numbers = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(headings))]
    for row in (headings, *cells):
        parts = zip(row, widths, numbers, strict=True)
        line = "  ".join(
            text.rjust(width) if right else text.ljust(width) for text, width, right in parts
        )
        typer.echo(line.rstrip())


def to_dict(message: Message) -> dict[str, Any]:
    """A message as JSON values: snake_case, zero values present, 64-bit integers as numbers."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    _widen(fields, message.DESCRIPTOR)
    return fields


def _widen(fields: dict[str, Any], descriptor: Any) -> None:
    """Turns the strings that protobuf's JSON has for 64-bit integers into numbers, in place.

    descriptor: the message's; its class depends on the protobuf implementation.
    """
    for field in descriptor.fields:
        value = fields.get(field.name)
        values = value if isinstance(value, list) else [value]
        if field.cpp_type in _WIDE and value is not None:
            fields[field.name] = [int(v) for v in values] if value is values else int(value)
        elif field.message_type is not None:
            for inner in values:
                if isinstance(inner, dict):  # a Timestamp is a string
                    _widen(inner, field.message_type)


def human_size(num_bytes: int) -> str:
    """1.5 MiB and the like."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} B"


def short_digest(digest: str) -> str:
    """sha256: and twelve digits: enough to tell revisions apart by eye."""
    return digest[: len("sha256:") + 12]


@contextmanager
def progress_bar(label: str) -> Iterator[Any]:
    """Yields progress(done, total) in bytes, drawn on stderr when that is a terminal."""
    with _progress() as progress:
        task = progress.add_task(label, total=None, start=False)

        def update(done: int, total: int) -> None:
            progress.start_task(task)
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def startup_bars() -> Iterator[StartupProgress]:
    """Yields a StartupProgress that draws bars on stderr, one at a time; logs may come between."""
    progress = _progress()
    tasks: dict[str, TaskID] = {}

    def update(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = progress.add_task(label)
            progress.start()
        progress.update(tasks[label], completed=done, total=total)
        if done == total:
            progress.stop()
            progress.remove_task(tasks.pop(label))

    try:
        yield update
    finally:
        progress.stop()


def startup_log() -> StartupProgress:
    """A StartupProgress that logs a line every NEWS_SECONDS."""
    next_news = time.monotonic() + NEWS_SECONDS

    def update(label: str, done: int, total: int) -> None:
        nonlocal next_news
        if time.monotonic() >= next_news:
            next_news = time.monotonic() + NEWS_SECONDS
            logger.info("%s: %s of %s", label, human_size(done), human_size(total))

    return update


@contextmanager
def stage_bars() -> Iterator[StageProgress]:
    """Yields a progress of training that draws a bar a stage on stderr, with the time left."""
    progress = _progress(
        MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    )
    drawn: dict[str, TaskID] = {}  # the stage that is going on

    def end() -> None:
        progress.stop()
        for stage in list(drawn):
            progress.remove_task(drawn.pop(stage))

    def update(stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in drawn:
            end()
            # What an earlier run did took this one no time.
            drawn[stage] = progress.add_task(stage, total=total, completed=done, note=note)
            progress.start()
        progress.update(drawn[stage], completed=done, total=total, note=note)
        if done == total:
            end()

    try:
        yield update
    finally:
        progress.stop()


def stage_log() -> StageProgress:
    """A progress of training that logs a line every STAGE_SECONDS, and one as a stage ends."""
    stage_begun = ""
    began = next_news = 0.0
    first = 0

    def update(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal stage_begun, began, next_news, first
        now = time.monotonic()
        if stage != stage_begun:
            stage_begun, began, next_news, first = stage, now, now + STAGE_SECONDS, done
        if now < next_news and done < total:
            return
        next_news = now + STAGE_SECONDS
        parts = [f"{stage}: {done} of {total}"]
        if first < done < total:
            parts.append(f"{_duration((now - began) / (done - first) * (total - done))} left")
        logger.info("%s", ", ".join([*parts, *([note] if note else [])]))

    return update


def _duration(seconds: float) -> str:
    """1:05:09, or 5:09 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _progress(*columns: ProgressColumn) -> Progress:
    """columns: behind label and bar; none: those of bytes."""
    console = Console(stderr=True)
    return Progress(
        *(TextColumn("{task.description}"), BarColumn()),
        *(columns or (DownloadColumn(), TransferSpeedColumn())),
        console=console,
        disable=not console.is_terminal,
    )
