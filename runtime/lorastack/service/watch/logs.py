"""Logging to stderr, as text or as one JSON object a line; request_id in both.

Whatever field a caller's text comes from, a record stays one line and reaches no terminal as a
command: see `printable`.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

import grpc

from lorastack.printable import printable, printable_json

# Attributes of every LogRecord; all others were given as `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure_logging(log_format: str, level: str = "info") -> None:
    """log_format: text or json. level: debug, info, warning or error. Replaces root handlers."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # huggingface-hub's HTTP library logs every address, signed ones too.
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(max(logging.INFO, logging.getLogger().level))
    # gRPC logs a traceback when a caller hangs up while the last message is on its way.
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_hang_up)


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, then the extras and the traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return printable_json(json.dumps(line, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """The same for people: extras follow the message as key=value, tracebacks are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        extras = "".join(f" {key}={value}" for key, value in _extras(record).items())
        return printable(super().formatMessage(record) + extras)

    def formatException(self, exc_info: Any) -> str:
        # splitlines() also cuts at separators in callers' texts: the rest would look like a record.
        lines = super().formatException(exc_info).split("\n")
        return "\n".join(f"  {printable(line)}" for line in lines)


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _is_no_hang_up(record: logging.LogRecord) -> bool:
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, grpc.aio.InternalError)
