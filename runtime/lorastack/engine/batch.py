"""What schedule, run and update hand to each other: plain values, filled once.

The scheduler fills RowStep and Batch; the runner fills RowResult.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.errors import LorastackError
from lorastack.request import Request, States, TokenLogprobs, TokenSource
from lorastack.sampling.processors import Processor
from lorastack.speculation.proposal import Proposal
from lorastack.speculation.tree import Tree


@dataclass(frozen=True, slots=True)
class RowHeads:
    """The heads that a row has pinned. private: its own correction of `whole`, if it has one."""

    whole: DeviceAdapter
    private: DeviceAdapter | None = None

    @property
    def digest(self) -> str:
        """What they go by: the private part's, which stands for both."""
        return (self.private or self.whole).digest

    @property
    def num_heads(self) -> int:
        return self.whole.layout.num_heads

    @property
    def has_draft_vocabulary(self) -> bool:
        """True if either brings the rows of lm_head that the heads choose from."""
        both = (self.whole, self.private)
        return any(part is not None and bool(part.layout.draft_vocabulary) for part in both)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowAdapters:
    """The adapters that a row has pinned for a step. loras: in the order of request.loras."""

    loras: tuple[DeviceAdapter, ...]
    heads: RowHeads | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStep:
    """One row's share of a step: a prompt chunk, or its last token and the nodes of its tree."""

    request: Request
    token_ids: tuple[int, ...]
    block_table: tuple[int, ...]
    committed: int  # tokens whose KV is in the pages already
    num_generated: int  # index, in the row's output, of the first token that is sampled
    samples: bool  # False: a prompt chunk that is not the last
    tree: Tree | None  # token_ids are its nodes'; None: a chain
    adapters: RowAdapters
    num_candidates: int  # tokens that each head shall propose; 0: heads do not run
    processor: Processor | None = None  # None: tokens come from the model's own logits
    scored: range = range(0)  # places in token_ids whose logits score the prompt's next token

    @property
    def decodes(self) -> bool:
        """True if it is the row's last token and its tree, see `Row.decodes`.

        A chunk of one token that more of the prompt follows does not decode.
        """
        return self.samples and (self.tree is not None or len(self.token_ids) == 1)

    @property
    def stack(self) -> list[tuple[str, float]]:
        """(digest, scale) of its LoRAs in order: neighbours with equal stacks share segments."""
        return [(use.digest, use.scale) for use in self.request.loras]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step. Rows of one stack of LoRAs lie side by side."""

    steps: tuple[RowStep, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the step that belong to rows that do not decode."""
        return sum(len(step.token_ids) for step in self.steps if not step.decodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What a step gave a row. tokens: of the accepted nodes, then one more sample; or ().

    sources: of the accepted nodes. prompt_logprobs: of the tokens behind `RowStep.scored`. states:
    those that predicted `tokens`, if the request captures them. error: ends the row, behind the
    tokens if there are any.
    """

    tokens: tuple[int, ...] = ()
    sources: tuple[TokenSource, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    states: States | None = None
    proposal: Proposal | None = None
    error: LorastackError | None = None
