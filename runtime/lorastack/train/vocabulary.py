"""The tokens that heads choose from: so few that drafting is cheap, and still nearly all they need.

What heads may propose never changes the output, so a token that is left out costs a missed guess
where the base says it, and nothing else.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorastack.adapters.formats.medusa import VOCABULARY_NAME, VOCABULARY_TENSOR


def choose_vocabulary(tokens: Iterable[int], size: int, vocab_size: int) -> list[int]:
    """The `size` most frequent of the base's tokens, rising.

    Equally frequent tokens are taken by id: tokenizers number their merges from the most frequent
    on.
    """
    counts = Counter(tokens)
    return sorted(sorted(range(vocab_size), key=lambda token: (-counts[token], token))[:size])


def coverage(vocabulary: Iterable[int], tokens: Sequence[int]) -> float:
    """The share of the tokens that the vocabulary holds."""
    known = set(vocabulary)
    return sum(token in known for token in tokens) / len(tokens)


def save_vocabulary(folder: Path, vocabulary: Sequence[int]) -> None:
    """Write the file into a heads folder. vocabulary: rising."""
    ids_N = torch.tensor(vocabulary, dtype=torch.int32)
    save_file({VOCABULARY_TENSOR: ids_N}, folder / VOCABULARY_NAME)


def load_vocabulary(folder: Path) -> Tensor | None:
    """int64 [N] of a heads folder; None without one: the heads choose from all."""
    path = folder / VOCABULARY_NAME
    return load_file(path)[VOCABULARY_TENSOR].long() if path.exists() else None
