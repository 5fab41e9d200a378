"""The PEFT folder of a LoRA merged of several: its config, and its tensors one at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from lorastack.adapters.formats.dtypes import DTYPES
from lorastack.adapters.formats.merging import MergeRule, merge_tensors, part_weights
from lorastack.adapters.formats.parse import ParsedAdapter
from lorastack.adapters.formats.refusal import unsupported
from lorastack.adapters.formats.targets import module_names
from lorastack.adapters.formats.tensorfile import pieces
from lorastack.layout import EMBED, ModelShapes, Part
from lorastack.tensorheader import TensorEntry, header_bytes

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_MEMORY = 2 << 30  # bytes that a merge may need at a time
_TEMPORARIES = 5  # tensors that are there beside the sources' at the worst moment
_FLOAT32 = 4  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSource:
    """A LoRA that is merged. name: what errors call it."""

    name: str
    parsed: ParsedAdapter
    weight: float


def target_seed(key: str, module: str) -> int:
    """The seed of what DARE draws for a module: A of every adapter, then B of every adapter.

    63 bits of sha256 over the merge's key, a NUL and the module's Hugging Face name.
    """
    return int.from_bytes(hashlib.sha256(f"{key}\0{module}".encode()).digest()[:8]) >> 1


class Merge:
    """What the sources have for each module, merged; modules that only some adapt of those.

    As PEFT's `add_weighted_adapter`, with rank r and scaling 1. Unlike there, use_rslora and
    layers_to_transform of the first source are not taken for all. Heads and templates stay out.
    """

    def __init__(
        self, sources: Sequence[MergeSource], rule: MergeRule, key: str, shapes: ModelShapes
    ) -> None:
        """key: seeds what DARE draws. Raises InvalidArgumentError for LoRAs of different ranks, and
        for tensors that need too much memory at a time."""
        self._sources = sources
        self._rule = rule
        self._key = key
        self._shapes = shapes
        self._rank = sources[0].parsed.facts.rank
        for source in sources:
            if (rank := source.parsed.facts.rank) != self._rank:
                raise unsupported(
                    f"{rule.strategy} merges LoRAs of one rank, but {sources[0].name!r} has rank "
                    f"{self._rank} and {source.name!r} has rank {rank}"
                )
        places = {place for source in sources for place in source.parsed.scales}
        self._places = {
            module: place for module, place in module_names(shapes).items() if place in places
        }
        self._ranks = {module: self._rank_of(module) for module in self._places}
        self._entries = [entry for module in self._places for entry in self._pair(module)]
        self._check_memory()

    @property
    def header(self) -> bytes:
        """The first bytes of the file of weights."""
        return header_bytes(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole file of weights."""
        return len(self.header) + sum(entry.nbytes for entry in self._entries)

    @property
    def config(self) -> bytes:
        """adapter_config.json."""
        other = {module: rank for module, rank in self._ranks.items() if rank != self._rank}
        names = {source.parsed.facts.base_model for source in self._sources} - {""}
        fields = {
            "base_model_name_or_path": min(names, default=None),
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "bias": "none",
            "r": self._rank,
            "lora_alpha": self._rank,
            "lora_dropout": 0.0,
            "target_modules": self._target_modules(),
            "rank_pattern": other,
            "alpha_pattern": other,
        }
        return json.dumps(fields, indent=2, sort_keys=True).encode()

    def write(self, file: BinaryIO, alive: Callable[[], None]) -> None:
        """Computes and writes the file of weights. alive: called between modules; may raise."""
        file.write(self.header)
        for module in self._places:
            alive()
            for tensor in self._merged(module):
                file.write(tensor.numpy().data)

    def _merged(self, module: str) -> tuple[Tensor, Tensor]:
        place = self._places[module]
        sources = [source for source in self._sources if place in source.parsed.scales]
        weights = part_weights([source.weight * source.parsed.scales[place] for source in sources])
        random = torch.Generator().manual_seed(target_seed(self._key, module))
        merged_A, merged_B = (
            merge_tensors(
                [_read(source.parsed.tensors[*place, part]) for source in sources],
                part_weight,
                self._rule,
                random,
            )
            for part, part_weight in zip((Part.A, Part.B), weights, strict=True)
        )
        return merged_A, merged_B

    def _rank_of(self, module: str) -> int:
        key = (*self._places[module], Part.A)
        ranks = {
            source.name: source.parsed.tensors[key].shape[0]
            for source in self._sources
            if key in source.parsed.tensors
        }
        if len(set(ranks.values())) > 1:
            listed = ", ".join(f"{name!r} {rank}" for name, rank in ranks.items())
            raise unsupported(
                f"{self._rule.strategy} merges LoRAs of one rank, but at {module} theirs differ: "
                f"{listed}"
            )
        return next(iter(ranks.values()))

    def _pair(self, module: str) -> tuple[TensorEntry, TensorEntry]:
        _, target = self._places[module]
        out_size, in_size = self._shapes.target_shape(target)
        form = "lora_embedding_{}" if target == EMBED else "lora_{}.weight"
        rank = self._ranks[module]
        name = f"base_model.model.{module}.{form}"
        return _entry(name.format("A"), (rank, in_size)), _entry(name.format("B"), (out_size, rank))

    def _target_modules(self) -> list[str]:
        """Short names if every layer has them all, else the modules' own."""
        targets = {target for _, target in self._places.values()}
        everywhere = {place for place in module_names(self._shapes).values() if place[1] in targets}
        return sorted(targets if everywhere == set(self._places.values()) else self._places)

    def _check_memory(self) -> None:
        largest = max(self._entries, key=lambda entry: entry.nbytes)
        needed = largest.nbytes * (len(self._sources) + _TEMPORARIES)
        if needed > MAX_MEMORY:
            raise unsupported(
                f"merging {len(self._sources)} tensors {largest.name} needs {needed} bytes of "
                f"memory, more than {MAX_MEMORY}: merge fewer LoRAs, or ones of a lower rank"
            )


def _entry(name: str, shape: tuple[int, ...]) -> TensorEntry:
    """A tensor that is still to be written."""
    nbytes = math.prod(shape) * _FLOAT32
    return TensorEntry(
        name=name, path=Path(WEIGHTS_NAME), dtype="F32", shape=shape, offset=0, nbytes=nbytes
    )


def _read(entry: TensorEntry) -> Tensor:
    """A stored tensor in float32, in which PEFT too keeps adapters of narrower dtypes."""
    values_N = torch.empty(math.prod(entry.shape))
    start = 0
    for data in pieces(entry):
        part_N = torch.from_numpy(data).view(DTYPES[entry.dtype])
        values_N[start : start + len(part_N)] = part_N
        start += len(part_N)
    return values_N.view(entry.shape)
