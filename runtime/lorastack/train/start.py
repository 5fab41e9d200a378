"""What a training begins with: zeros, heads that learn on, or a private part of heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorastack.adapters.formats.medusa import MAX_HEADS, MAX_LAYERS
from lorastack.adapters.store.durable import hash_file
from lorastack.adapters.store.ids import split_reference
from lorastack.errors import InvalidArgumentError
from lorastack.folders import HEADS_WEIGHTS
from lorastack.request import HeadsUse
from lorastack.train.folder import SharedHeads
from lorastack.train.heads import MedusaHeads, identity_heads, with_private
from lorastack.train.local import LocalEngine
from lorastack.train.named import NamedHeads, named_heads

NUM_HEADS, NUM_LAYERS, PRIVATE_RANK = 4, 1, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """What a user says of it; None where nothing is said.

    continue_from, shared: heads by id or folder, "" for none. private_rank: goes with `shared`.
    """

    num_heads: int | None = None
    num_layers: int | None = None
    continue_from: str = ""
    shared: str = ""
    private_rank: int | None = None

    def check(self) -> None:
        """Raises InvalidArgumentError for options that contradict each other."""
        if self.continue_from and self.shared:
            raise InvalidArgumentError(
                "--continue-from and --from exclude each other: heads learn on, or stay as they "
                "are and get a private part"
            )
        if self.private_rank is not None and not self.shared:
            raise InvalidArgumentError("--private-rank goes with --from: name the heads to correct")
        if max(self.num_heads or 1, self.num_layers or 1) > min(MAX_HEADS, MAX_LAYERS):
            raise InvalidArgumentError(
                f"--num-heads may be {MAX_HEADS}, --num-layers {MAX_LAYERS} at most"
            )
        given = self.continue_from or self.shared
        if given and (self.num_heads is not None or self.num_layers is not None):
            raise InvalidArgumentError(
                f"--num-heads and --num-layers are those of {given}: leave them out"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """heads: before the first step. use: the heads that they come from, as the engine serves them.
    shared, ids_N: of a private part, which heads it corrects and the draft vocabulary of these.
    """

    heads: MedusaHeads
    use: HeadsUse | None = None
    shared: SharedHeads | None = None
    ids_N: Tensor | None = None

    @property
    def digest(self) -> str:
        """Of the heads that they come from; "" for none."""
        return "" if self.use is None else self.use.digest


def open_start(engine: LocalEngine, options: StartOptions, seed: int) -> Start:
    """Raises as `named_heads`; InvalidArgumentError for version 1 heads."""
    if not options.continue_from and not options.shared:
        num_heads, num_layers = options.num_heads or NUM_HEADS, options.num_layers or NUM_LAYERS
        size = engine.model.backend.shapes.hidden_size
        return Start(heads=identity_heads(num_heads, num_layers, size))
    option = "--from" if options.shared else "--continue-from"
    named = named_heads(engine, options.shared or options.continue_from, option)
    if named.heads.outputs:
        raise InvalidArgumentError(
            f"{option} {named.name}: version 1 heads, with output matrices of their own, are not "
            "trained; name version 2 heads, or leave the option out"
        )
    if named.use.shared_digest:
        raise InvalidArgumentError(
            f"{option} {named.name} is a private part of {named.use.shared_id}: name whole heads"
        )
    if not options.shared:
        return Start(heads=named.heads, use=named.use)
    if HEADS_WEIGHTS not in named.files:
        raise InvalidArgumentError(
            f"--from {named.name}: a private part is for heads whose weights are in {HEADS_WEIGHTS}"
        )
    rank = PRIVATE_RANK if options.private_rank is None else options.private_rank
    return Start(
        heads=with_private(named.heads, rank, seed),
        use=named.use,
        shared=SharedHeads(id=_id_of(named), sha256=hash_file(named.files[HEADS_WEIGHTS])),
        ids_N=named.ids_N,
    )


def _id_of(named: NamedHeads) -> str:
    """The id that shared heads are found by; a folder is uploaded under its own name."""
    if named.folder is None:
        return split_reference(named.use.medusa_id)[0]
    return named.folder.resolve().name
