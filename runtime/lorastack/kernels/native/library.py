"""The compiled library: ctypes mirrors of abi.h, and loading."""

from __future__ import annotations

import ctypes
import logging
from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - see `library`

from lorastack.kernels.native import build

log = logging.getLogger(__name__)


class Matrix(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("panels", c_int32),
        ("k", c_int32),
        ("kind", c_int32),
        ("unused", c_int32),
    )


class Layer(Structure):
    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("o", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("kv", c_void_p),
    )


class Target(Structure):
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("scale", c_float), ("rank", c_int32))


class Segment(Structure):
    _fields_ = (
        ("targets", c_void_p),
        ("start", c_int32),
        ("end", c_int32),
        ("scale", c_float),
        ("max_rank", c_int32),
    )


class Row(Structure):
    _fields_ = (
        ("pages", c_void_p),
        ("parents", c_void_p),
        ("start", c_int32),
        ("end", c_int32),
        ("committed", c_int32),
        ("unused", c_int32),
    )


class Model(Structure):
    _fields_ = (
        ("layers", c_void_p),
        ("lm_head", Matrix),
        ("embed", c_void_p),
        ("norm", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("num_layers", c_int32),
        ("hidden", c_int32),
        ("inner", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("page_size", c_int32),
        ("vocabulary", c_int32),
        ("window", c_int32),
        ("eps", c_float),
        ("isa", c_int32),
        ("half", c_int32),
    )


class Step(Structure):
    _fields_ = (
        ("rows", c_void_p),
        ("segments", c_void_p),
        ("tokens", c_void_p),
        ("embedded", c_void_p),
        ("outputs", c_void_p),
        ("out", c_void_p),
        ("logits", c_void_p),
        ("peaks", c_void_p),
        ("best", c_void_p),
        ("scratch", c_void_p),
        ("num_rows", c_int32),
        ("num_tokens", c_int32),
        ("num_segments", c_int32),
        ("num_outputs", c_int32),
        ("num_threads", c_int32),
        ("unused", c_int32),
    )


class LmHead(Structure):
    _fields_ = (
        ("matrix", Matrix),
        ("segments", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("scratch", c_void_p),
        ("num_segments", c_int32),
        ("rows", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("num_threads", c_int32),
        ("isa", c_int32),
        ("half", c_int32),
    )


class Heads(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("output", c_void_p),
        ("ids", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("start", c_int32),
        ("end", c_int32),
        ("heads", c_int32),
        ("blocks", c_int32),
        ("outputs", c_int32),
        ("own", c_int32),
        ("rank", c_int32),
        ("unused", c_int32),
    )


class Proposal(Structure):
    _fields_ = (
        ("groups", c_void_p),
        ("x", c_void_p),
        ("states", c_void_p),
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
        ("num_groups", c_int32),
        ("hidden", c_int32),
        ("num", c_int32),
        ("num_threads", c_int32),
        ("isa", c_int32),
        ("half", c_int32),
    )


class Sample(Structure):
    _fields_ = (
        ("start", c_uint64),
        ("temperature", c_double),
        ("top_p", c_double),
        ("min_p", c_double),
        ("row", c_int32),
        ("top_k", c_int32),
    )


# In the order of abi.h, whose sizes the library has too.
STRUCTS: tuple[type[Structure], ...] = (
    *(Matrix, Layer, Target, Segment, Row, Model, Step),
    *(LmHead, Heads, Proposal, Sample),
)
# The types of each function's result and then of its arguments.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "lorastack_scratch_bytes": (c_int64, POINTER(Model), POINTER(Step)),
    "lorastack_forward": (None, POINTER(Model), POINTER(Step)),
    "lorastack_logits": (None, POINTER(LmHead)),
    "lorastack_best": (None, c_int32, c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int32),
    "lorastack_propose": (None, POINTER(Proposal)),
    "lorastack_top": (
        *(None, c_int32, c_void_p, c_int32, c_int32),
        *(c_int32, c_void_p, c_void_p, c_int32),
    ),
    "lorastack_sample_rows": (
        *(None, c_int32, c_void_p, c_int64, c_int32),
        *(POINTER(Sample), c_int32, c_void_p, c_int32),
    ),
    "lorastack_quantise": (
        *(None, c_int32, c_void_p, c_int32, c_int32, c_int32),
        *(c_void_p, c_void_p, c_int32),
    ),
    "lorastack_supports": (c_int32, c_int32),
}


def library() -> Any | None:
    """The loaded library; None where there is none that fits these sources, see `problem`.

    It is linked with OpenMP under the name that torch's own has. Torch is imported first, so
    both share one pool of threads.
    """
    return _load(build.LIBRARY)[0]


def problem() -> str:
    """Why `library` gives None, with the remedy; "" if it does not."""
    return _load(build.LIBRARY)[1]


@cache
def _load(path: Path) -> tuple[Any | None, str]:
    """The library, or None and why, which is logged once."""
    loaded, why = None, "the native library is not built"
    if path.exists():
        try:
            loaded = ctypes.CDLL(str(path))
            why = _mismatch(loaded)
        except OSError as error:
            why = f"the native library cannot be loaded: {error}"
    if why:
        remedy = "build it with `python -m lorastack.kernels.native.build`"
        if build.found_compiler() is None:
            remedy = f"{build.NO_COMPILER}, then {remedy}"
        why += f"; {remedy}"
        log.warning("no native kernels, steps run in plain torch: %s", why)
        return None, why
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded, ""


def _mismatch(loaded: ctypes.CDLL) -> str:
    """Why a library must not be called, "" if it may. Reads its constants and calls nothing."""
    sources = build.sources().encode()
    try:
        its_sources = (c_char * len(sources)).in_dll(loaded, "lorastack_sources").value
        if its_sources != sources:
            return "the native library is stale, built from other sources"
        its_sizes = (c_int32 * len(STRUCTS)).in_dll(loaded, "lorastack_sizes")
    except ValueError:  # no such symbol
        return "the native library is stale, of another version"
    if list(its_sizes) != [ctypes.sizeof(struct) for struct in STRUCTS]:
        return "the native library does not fit, its structs have other sizes"
    return ""
