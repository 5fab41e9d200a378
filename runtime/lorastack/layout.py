"""Shapes of the base model and the layout of an adapter's buffer. No torch here.

An adapter on a device is ONE flat buffer; `AdapterLayout` says where each tensor lies in it.
Tensor names end in the letters of their shape, see docs/architecture.md ("Words").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

ALIGNMENT = 64  # bytes of a cache line, on which runs of tensors start

# Projections of a decoder layer in buffer order; those of one group share their input.
GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
LAYER_TARGETS: tuple[str, ...] = tuple(target for group in GROUPS for target in group)
EMBED = "embed_tokens"
LM_HEAD = "lm_head"
HEADS = "heads"
MAX_RANK = 64  # the most tokens that one head may propose
MAX_DRAFT_VOCABULARY = 16384  # tokens of a vocabulary that heads bring themselves
MAX_PRIVATE_RANK = 64  # of a private part of heads
NO_LAYER = -1  # the `layer` of embed_tokens and lm_head; for heads see `head_block`


class Part(StrEnum):
    """Which tensor of a target."""

    A = "A"  # LoRA [rank, in]; embeddings [rank, V]; a private part of a Medusa block [rank, H]
    B = "B"  # LoRA [out, rank]; a private part of a Medusa block [H, rank]
    WEIGHT = "weight"  # Medusa block [H, H]
    BIAS = "bias"  # Medusa block [H]
    OUTPUT = "output"  # a Medusa version 1 head's own output matrix [V, H]; its layer is the head
    DRAFT = "draft"  # the base lm_head's rows of a draft vocabulary [N, H]; see `DRAFT_KEY`


class AdapterKind(StrEnum):
    """What an adapter's folder holds."""

    LORA = "lora"
    MEDUSA = "medusa"
    LORA_WITH_MEDUSA = "lora_with_medusa"
    ALIAS = "alias"  # a name for other adapters, without a tensor

    @property
    def has_lora(self) -> bool:
        """True if a row may name it in its stack."""
        return self in (AdapterKind.LORA, AdapterKind.LORA_WITH_MEDUSA)

    @property
    def has_heads(self) -> bool:
        """True if a row may use its Medusa heads."""
        return self in (AdapterKind.MEDUSA, AdapterKind.LORA_WITH_MEDUSA)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShapes:
    """Dimensions of a base model of the Llama/Mistral family."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    tie_word_embeddings: bool

    def target_shape(self, target: str) -> tuple[int, int]:
        """(out, in) of a target's weight; for embed_tokens (H, V), as its LoRA sees it."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden_size),
            "k_proj": (key, self.hidden_size),
            "v_proj": (key, self.hidden_size),
            "o_proj": (self.hidden_size, query),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
            EMBED: (self.hidden_size, self.vocab_size),
            LM_HEAD: (self.vocab_size, self.hidden_size),
        }[target]


TensorKey = tuple[int, str, Part]  # (layer, target, part)
DRAFT_KEY: TensorKey = (0, HEADS, Part.DRAFT)


def head_block(head: int, block: int, num_heads: int) -> int:
    """The `layer` of a head's block, both counted from 0: all heads' first blocks come first."""
    return block * num_heads + head


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a tensor lies in the flat buffer. offset: elements, not bytes."""

    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """The table of an adapter's flat buffer, all of one dtype.

    In a group the A parts of its targets are adjacent without gaps, so one matmul shrinks for all
    of them; so are the weights of all heads' blocks, their biases, version 1 heads' outputs, and
    the A parts and the B parts of a private part of heads.
    """

    slots: Mapping[TensorKey, TensorSlot]
    scales: Mapping[tuple[int, str], float]  # by (layer, target): alpha / r or alpha / sqrt(r)
    num_elements: int
    itemsize: int  # bytes an element
    num_heads: int  # Medusa heads, also those that it corrects; 0 for a plain LoRA
    draft_vocabulary: tuple[int, ...] = ()  # rising token ids that heads choose from, () for all

    @property
    def nbytes(self) -> int:
        """Bytes of the whole buffer."""
        return self.num_elements * self.itemsize
