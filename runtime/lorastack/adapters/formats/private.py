"""Private parts: a low-rank correction of shared Medusa heads, made for one LoRA.

config.json has the fields of version 2 heads, and

    "shared_heads": {"id": "heads-general", "sha256": "<hex of their medusa_lm_head.safetensors>"},
    "private_rank": R

Block l of head k has `{k}.{l}.linear.lora_A.weight [R, H]` and `{k}.{l}.linear.lora_B.weight
[H, R]`: W + B A stands for the shared block's W. Biases are the shared heads', and so is the draft
vocabulary where the folder has none of its own, `draft_vocabulary.safetensors`. The shared heads
must be of version 2: nothing trains a correction of heads with output matrices of their own,
against which such a part would save little.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorastack.adapters.formats.facts import SharedHeads
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.layout import HEADS, Part, TensorKey, head_block

SHARED_FIELD = "shared_heads"
RANK_FIELD = "private_rank"
PRIVATE_TENSOR = re.compile(r"\d+\.\d+\.linear\.lora_[AB]\.weight")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_ID = 256  # characters


def is_private(config: Mapping[str, object]) -> bool:
    """True if a heads' config.json is a private part's."""
    return SHARED_FIELD in config or RANK_FIELD in config


def shared_heads(config: Mapping[str, object], file: str) -> SharedHeads:
    """The heads that a part corrects. Raises InvalidArgumentError naming the field."""
    fields = config.get(SHARED_FIELD)
    if not isinstance(fields, dict) or fields.keys() != {"id", "sha256"}:
        raise invalid(
            f"{SHARED_FIELD} in {file} must be an object of id and sha256: which heads "
            "this private part corrects"
        )
    name, sha256 = fields["id"], fields["sha256"]
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_ID or not name.isprintable():
        raise invalid(f"{SHARED_FIELD}.id in {file} must be the shared heads' adapter id")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise invalid(
            f"{SHARED_FIELD}.sha256 in {file} must be the 64 lower-case hex digits of the sha256 "
            "of the shared heads' medusa_lm_head.safetensors"
        )
    return SharedHeads(id=name, sha256=sha256)


def check_version(config: Mapping[str, object], file: str) -> None:
    """Raises InvalidArgumentError unless a part says that it is of version 2."""
    stated = config.get("version")
    if isinstance(stated, bool) or str(stated).removesuffix(".0") != "2":
        shown = "no version" if stated is None else f"version = {str(stated)[:64]!r}"
        raise unsupported(
            f"{file} of a private part has {shown}: private parts go with version 2 heads only, "
            'so set "version": "2"'
        )


def expected_tensors(
    num_heads: int, num_layers: int, rank: int, hidden_size: int
) -> dict[str, tuple[TensorKey, tuple[int, ...]]]:
    """Tensor name -> (key, shape) of every tensor that a part must have."""
    expected: dict[str, tuple[TensorKey, tuple[int, ...]]] = {}
    for head in range(num_heads):
        for block in range(num_layers):
            layer = head_block(head, block, num_heads)
            name = f"{head}.{block}.linear.lora_"
            expected[f"{name}A.weight"] = (layer, HEADS, Part.A), (rank, hidden_size)
            expected[f"{name}B.weight"] = (layer, HEADS, Part.B), (hidden_size, rank)
    return expected
