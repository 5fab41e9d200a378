"""Damage to adapter folders, as hypothesis strategies: a folder is file name -> bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Folder = dict[str, bytes]
Draw = st.DrawFn

MAX_DEPTH = 3000  # beyond what any recursive reader stands
NAMES = st.sampled_from(
    [
        *("adapter_config.json", "config.json", "adapter_model.safetensors", "README.md"),
        *("medusa_lm_head.safetensors", "chat_template.jinja", "tokenizer_config.json"),
        *("draft_vocabulary.safetensors", "tokenizer.json", "added_tokens.json"),
        *("adapter_model.bin", "x.py", "x.pt", "x.json", "x.safetensors", "../x", "a/b", ".", ""),
        *("/etc/passwd", "a\0b", "é", "x" * 300, ".tmp", "LOCK"),
    ]
)
FIELDS = st.sampled_from(
    [
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
        *("layers_to_transform", "layers_pattern", "exclude_modules", "use_dora", "bias"),
        *("modules_to_save", "init_lora_weights", "peft_type", "task_type", "unknown_field"),
        *("base_model_name_or_path", "medusa_num_heads", "medusa_num_layers", "version"),
        *("chat_template", "__metadata__", "added_tokens", "added_tokens_decoder"),
    ]
)
STRINGS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            *("q_proj", "all-linear", "LORA", "gaussian", "tiny", "2", "F64", "model.layers.0"),
            *("\ud800", "a\nb", "\x1b[31m", "\u202e", "none", "(?R)*", r"(.)\1", "(?i)q_proj"),
            *(r".*", r"(a+)+b", r"(.*)*x", r"(((a{1,99}){1,99}){1,99})*", "(", r"\d", "[", "\\"),
        ]
    ),
    st.sampled_from([100, 5000, 10**6]).map(lambda length: "x" * length + "/tiny"),
)
NUMBERS = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**48, 2**63, 2**64, 10**30, 10**400, -(2**63)]),
    st.floats(),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS)
VALUES = st.one_of(
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(STRINGS, FIELDS), inner, max_size=4),
        ),
        max_leaves=8,
    ),
    st.integers(100, 10_000).map(lambda length: list(range(length))),
)


@st.composite
def mutated(draw: Draw, folders: list[Folder]) -> Folder:
    """One of the folders after one to three mutations. What it was before stays as it is."""
    folder = dict(draw(st.sampled_from(folders)))
    for mutate in draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        if folder:
            mutate(draw, folder)
    return folder


def _some_file(draw: Draw, folder: Folder, suffix: str = "") -> str | None:
    names = [name for name in sorted(folder) if name.endswith(suffix)]
    return draw(st.sampled_from(names)) if names else None


def _bytes(draw: Draw, folder: Folder) -> None:
    """Replaces, inserts or removes a run of bytes."""
    name = _some_file(draw, folder)
    assert name is not None
    data = folder[name]
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 64)))
    folder[name] = data[:start] + draw(st.binary(max_size=64)) + data[end:]


def _cut(draw: Draw, folder: Folder) -> None:
    name = _some_file(draw, folder)
    assert name is not None
    folder[name] = folder[name][: draw(st.integers(0, len(folder[name])))]


def _files(draw: Draw, folder: Folder) -> None:
    """Removes, renames, copies, swaps or adds a file."""
    name, other = _some_file(draw, folder), _some_file(draw, folder)
    assert name is not None and other is not None
    match draw(st.sampled_from(["remove", "rename", "copy", "swap", "add"])):
        case "remove":
            del folder[name]
        case "rename":
            folder[draw(NAMES)] = folder.pop(name)
        case "copy":
            folder[draw(NAMES)] = folder[name]
        case "swap":
            folder[name], folder[other] = folder[other], folder[name]
        case "add":
            folder[draw(NAMES)] = draw(st.binary(max_size=64))


def _config(draw: Draw, folder: Folder) -> None:
    """Another value for a field of a JSON file."""
    name = _some_file(draw, folder, ".json")
    table = _object(folder[name]) if name is not None else None
    if name is None or table is None:
        return
    keys = st.sampled_from(sorted(table)) if table else FIELDS
    table[draw(st.one_of(keys, FIELDS))] = draw(VALUES)
    folder[name] = _dump(table)


def _nest(draw: Draw, folder: Folder) -> None:
    """A value that is nested deeply."""
    name = _some_file(draw, folder, ".json")
    table = _object(folder[name]) if name is not None else None
    if name is None or table is None:
        return
    field, depth = draw(FIELDS), draw(st.integers(1, MAX_DEPTH))
    opened, closed = draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
    rest = json.dumps({key: value for key, value in table.items() if key != field})[1:]
    text = f'{{"{field}": {opened * depth}1{closed * depth}{", " if rest != "}" else ""}{rest}'
    folder[name] = text.encode()


def _header(draw: Draw, folder: Folder) -> None:
    """Another value in a safetensors header, whose length may lie too."""
    name = _some_file(draw, folder, ".safetensors")
    data = folder[name] if name is not None else b""
    if name is None or len(data) < 8:
        return
    (length,) = struct.unpack("<Q", data[:8])
    table = _object(data[8 : 8 + length])
    if not table:
        return
    tensor = draw(st.sampled_from(sorted(table)))
    fields = table[tensor]
    match draw(st.sampled_from(["field", "shape", "remove", "rename", "value"])):
        case "field" if isinstance(fields, dict):
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            fields[key] = draw(VALUES)
        case "shape" if isinstance(fields, dict):
            fields["shape"] = draw(st.lists(st.sampled_from([0, 1, 2, 16, 2**47]), max_size=9))
        case "remove":
            del table[tensor]
        case "rename":
            table[draw(STRINGS)] = table.pop(tensor)
        case _:
            table[tensor] = draw(VALUES)
    header = _dump(table)
    stated = draw(st.sampled_from([len(header)] * 4 + [0, len(header) + 1, 2**32, 2**63]))
    folder[name] = struct.pack("<Q", stated) + header + data[8 + length :]


def _numbers(draw: Draw, folder: Folder) -> None:
    """Bit patterns of NaN, infinities and huge values among the weights."""
    name = _some_file(draw, folder, ".safetensors")
    if name is None or len(folder[name]) < 16:
        return
    pattern = draw(st.sampled_from([b"\xff", b"\x7f", b"\x80\x7f", b"\xf0\x7f", b"\x7c\x7e\x7e"]))
    position = draw(st.integers(8, len(folder[name]) - len(pattern)))
    data = bytearray(folder[name])
    data[position : position + len(pattern)] = pattern
    folder[name] = bytes(data)


MUTATIONS: list[Callable[[Draw, Folder], None]] = [
    *(_bytes, _cut, _files, _config, _config, _nest, _header, _header, _numbers)
]


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dump(value: Any) -> bytes:
    """JSON with NaN and Infinity in it, as Python writes them; lone surrogates stay escaped."""
    return json.dumps(value).encode()
