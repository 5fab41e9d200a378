"""Compares an adapter's name for its base model with the names of the model that is served.

Trainers write what they were given: a hub id, a mirror or a quantised copy of it, a folder. Shapes
are checked anyway; a name can only tell models of the same shapes apart. So hub ids are compared by
the model's own name, and a local path that says something else causes a warning only.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum

_HUB = re.compile(r"^[a-z]+://|^(www\.)?(huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.cn)/+")
_PAGE = re.compile(r"/(tree|blob|resolve)/.*$")
_CACHED = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)(?:/snapshots(?:/[^/]*)?)?$")
_REVISION = re.compile(r"@[^@/]*$")
# Endings of copies of a model: quantised, converted, in another dtype or file format.
_COPY = re.compile(
    r"(?:[-_. ](?:unsloth|dynamic|quantized|quants?|bnb|gptq|awq|hqq|eetq|aqlm|marlin|exl[23]|mlx"
    r"|gguf|ggml|i1|imatrix|onnx|ct2|nf4|fp4|int[48]|[48][-_ ]?bits?|w\d+a\d+|\d+g"
    r"|b?fp?(?:4|8|16|32)|(?:mx|nv)fp[48]|e4m3|q\d(?:_[k01])?(?:_[sml])?|hf|safetensors|copy))+$"
)
# Last components that say nothing about the model: _UNNAMED in any path, _WORD without folders.
_UNNAMED = re.compile(r"checkpoint([-_]?\d+)?|[0-9a-f]{7,64}")
_WORD = re.compile(
    r"(the|my)?[-_]?(base|merged|final|best|last|latest|local)?"
    r"[-_]?(llm|models?|hf|weights|outputs?|results?|checkpoints?|ckpt|snapshots?|run|main|tmp|dir)?"
    r"[-_]?\d*"
)
# First components of relative paths; no organisation of a hub has such a name.
_FOLDERS = re.compile(
    r"(models?|outputs?|out|results?|saves?|saved|checkpoints?|ckpts?|runs?|tmp)/"
)


class Same(Enum):
    """What two names say about two models."""

    YES = "yes"
    PERHAPS = "perhaps"  # a path of the trainer's machine
    NO = "no"


def same_model(name: str, served: Collection[str]) -> Same:
    """Compares the name in an adapter's config with all names of the server's model."""
    model, is_path = _model(name)
    if model in {_model(other)[0] for other in served}:
        return Same.YES
    return Same.PERHAPS if is_path else Same.NO


def _model(name: str) -> tuple[str, bool]:
    """(the model's own name in small letters without the marks of a copy, True for a path)."""
    text = name.strip().casefold().replace("\\", "/").rstrip("/")
    text = _PAGE.sub("", _HUB.sub("", _HUB.sub("", text)))
    if cached := _CACHED.search(text):  # the hub's own cache says which model it is
        text = f"{cached[1]}/{cached[2]}"
    last = _REVISION.sub("", text).rpartition("/")[2].replace("___", ".")  # ModelScope's folders
    is_path = (
        text.count("/") > 1
        or text.startswith(("/", ".", "~"))
        or ":" in text
        or _FOLDERS.match(text) is not None
        or _UNNAMED.fullmatch(last) is not None
        or ("/" not in text and _WORD.fullmatch(last) is not None)
    )
    return _COPY.sub("", last).removeprefix("meta-") or last, is_path
