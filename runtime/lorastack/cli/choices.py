"""What flags of `lorastack serve` choose among; the docstrings are their help."""

from __future__ import annotations

from enum import StrEnum


class Device(StrEnum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    """The type of weights, KV, LoRAs and heads; auto is bfloat16, but float32 in plain torch."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Backend(StrEnum):
    """What computes a step; auto is triton on a GPU and native on a CPU where they run the model,
    else torch."""

    AUTO = "auto"
    TORCH = "torch"
    NATIVE = "native"
    TRITON = "triton"


class Quantize(StrEnum):
    """What the base model's weights are stored as; adapters stay as they are."""

    INT8 = "int8"
    INT4 = "int4"


class LogFormat(StrEnum):
    """How lines on stderr are written."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The lowest level that is logged; debug has a line for every call that only reads."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
