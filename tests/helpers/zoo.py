"""The adapters that system tests run: canaries with their heads, random LoRAs, a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from tests.helpers.adapters import write_draft_vocabulary, write_heads, write_lora, write_private
from tests.helpers.canary import (
    train_layer_canary,
    write_blank_heads,
    write_canary,
    write_canary_heads,
    write_canary_part,
)
from tests.helpers.guessing import train_heads

WORDS = ("owl", "fjord", "bat", "mink", "zephyr")  # `say-WORD`, with heads `heads-WORD`
BLANK_HEADS = "heads-blank"  # right for nobody
PRIVATE_WORDS = ("owl", "mink", "zephyr")  # `private-WORD`, parts of BLANK_HEADS
PRIVATE_RANDOM = "private-random"  # a part of heads-5
LAYER_WORDS = ("elk", "wasp")  # `say-WORD`, through the layers
RANDOM_LORAS = ("random-a", "random-b", "random-c")
RANDOM_HEADS = ("heads-2", "heads-5", "heads-own")  # the last: version 1
TRAINED_HEADS = "heads-wise"  # know the base model's outputs of FAMILIAR, more or less
NARROW_HEADS = "heads-narrow"  # the same, choosing from every second token
FAMILIAR = ("hello there", "The quick brown fox", "naïve 日本 🦉", "1 + 1 = ", "a", "Why? " * 9)
BUNDLE = "bundle"


def build_zoo(root: Path, model: Path, shapes: ModelShapes) -> dict[str, Path]:
    """Adapter id -> folder, all for the single-file model folder `model`."""
    zoo: dict[str, Path] = {}
    for word in WORDS:
        zoo[f"say-{word}"] = write_canary(root / f"say-{word}", model, shapes, word)
        zoo[f"heads-{word}"] = write_canary_heads(root / f"heads-{word}", model, shapes, word)
    zoo[BLANK_HEADS] = write_blank_heads(root / BLANK_HEADS, shapes)
    for word in PRIVATE_WORDS:
        name = f"private-{word}"
        zoo[name] = write_canary_part(root / name, zoo[BLANK_HEADS], model, shapes, word)
    for word in LAYER_WORDS:
        zoo[f"say-{word}"] = train_layer_canary(root / f"say-{word}", model, word)
    everything = (*LAYER_TARGETS, EMBED, LM_HEAD)
    zoo["random-a"] = write_lora(root / "random-a", shapes, seed=11, rank=8)
    zoo["random-b"] = write_lora(
        root / "random-b", shapes, seed=12, rank=3, alpha=5, targets=everything, use_rslora=True
    )
    zoo["random-c"] = write_lora(
        root / "random-c", shapes, seed=13, rank=17, targets=("q_proj", "up_proj"), layers=[1]
    )
    zoo["heads-2"] = write_heads(root / "heads-2", shapes.hidden_size, num_heads=2, seed=21)
    zoo["heads-5"] = write_heads(root / "heads-5", shapes.hidden_size, num_heads=5, seed=22)
    zoo[PRIVATE_RANDOM] = write_private(root / PRIVATE_RANDOM, zoo["heads-5"], rank=5)
    zoo["heads-own"] = write_heads(
        root / "heads-own", shapes.hidden_size, num_heads=1, vocab_size=shapes.vocab_size, seed=23
    )
    zoo[TRAINED_HEADS] = train_heads(root / TRAINED_HEADS, model, FAMILIAR)
    zoo[NARROW_HEADS] = shutil.copytree(zoo[TRAINED_HEADS], root / NARROW_HEADS)
    write_draft_vocabulary(zoo[NARROW_HEADS], torch.arange(0, shapes.vocab_size, 2))
    zoo[BUNDLE] = write_lora(root / BUNDLE, shapes, seed=14, rank=4)
    for path in zoo["heads-5"].iterdir():
        shutil.copy(path, zoo[BUNDLE])
    return zoo
