"""What shard 0 tells the others: over a socket to each what all of them then do together, and over
another one, beside steps, which LoRAs they hold (`Hold`, `Drop`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from lorastack.layout import AdapterLayout
from lorastack.model.backends.parallel.shards import Shard
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch
from lorastack.model.kv import Move


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a process is told first. config: the whole model's. threads: CPU threads of a step;
    timeout: seconds that one waits for another."""

    shard: Shard
    folder: Path
    config: DecoderConfig
    device: torch.device
    dtype: torch.dtype
    threads: int
    timeout: float


class Use(NamedTuple):
    """A `Segment` whose LoRA has a number."""

    start: int
    end: int
    number: int
    scale: float


@dataclass(frozen=True, slots=True)
class Join:
    """Find the other shards: all have read their weights."""


@dataclass(frozen=True, slots=True)
class MakeKV:
    """Make room for keys and values. They get numbers from 0, in the order of making."""

    num_pages: int
    page_size: int


@dataclass(frozen=True, slots=True)
class MoveKV:
    """`KVCache.move`."""

    kv: int
    moves: Sequence[Move]


@dataclass(frozen=True, slots=True)
class Hold:
    """Take over the shard's part of a LoRA. layout: of the whole adapter. An open file follows,
    with the values of the part's tensors one behind the other."""

    number: int
    layout: AdapterLayout


@dataclass(frozen=True, slots=True)
class Drop:
    """Let go of a LoRA that no step uses any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Run:
    """Run a step. batch: without LoRAs, which are `uses`, and without trees."""

    kv: int
    batch: ForwardBatch
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Logits:
    """`Backend.logits` of states that are broadcast."""

    num_rows: int
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """The end."""


Order: TypeAlias = Join | MakeKV | MoveKV | Hold | Drop | Run | Logits | Stop
