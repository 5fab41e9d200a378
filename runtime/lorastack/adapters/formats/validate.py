"""Everything an upload must pass before it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorastack.adapters.formats.dtypes import DTYPES
from lorastack.adapters.formats.parse import (
    ParsedAdapter,
    check_base,
    check_chat_template,
    check_values,
    parse,
)
from lorastack.adapters.formats.refusal import invalid, unsupported
from lorastack.adapters.formats.tensorfile import pieces
from lorastack.adapters.formats.tokens import TokenId, check_tokens
from lorastack.layout import EMBED, LM_HEAD, ModelShapes
from lorastack.tensorheader import TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """Everything an upload must pass; given to `Upload.commit`.

    base_names: what the server's model is called, aliases too. base_weight: base tensor name
    (model.embed_tokens.weight, lm_head.weight) -> that tensor, to compare copies that PEFT saved.
    dtype: the server computes with it, and adapters are converted to it. base_token: a token's id
    in the base model's tokenizer, None if it has none; without base_token, tokenizer files are not
    read. check_template: compiles a chat template and raises if it is malformed. check_acceptance:
    raises unless trees of so many heads can start from an `acceptance`.
    """

    shapes: ModelShapes
    base_names: tuple[str, ...]
    base_weight: Callable[[str], Tensor]
    dtype: torch.dtype = torch.float32
    base_token: TokenId | None = None
    check_template: Callable[[str], None] | None = None
    check_acceptance: Callable[[str, int], None] | None = None

    def __call__(self, files: Mapping[str, Path], *, accept_base: bool = False) -> ParsedAdapter:
        """The checked folder, with warnings. accept_base: any base model's name passes.

        Raises InvalidArgumentError or FailedPreconditionError.
        """
        parsed = parse(files, self.shapes)
        warnings = check_base(parsed, self.base_names, accept=accept_base)
        check_chat_template(parsed, files)
        if self.base_token is not None:
            warnings += check_tokens(
                files,
                self.base_token,
                template=parsed.chat_template,
                trained_rows=self._trained_rows(parsed),
            )
        check_values(parsed)
        if parsed.chat_template is not None and self.check_template is not None:
            self.check_template(parsed.chat_template)
        if parsed.facts.acceptance and self.check_acceptance is not None:
            self.check_acceptance(parsed.facts.acceptance, parsed.facts.num_heads)
        for entry in parsed.tensors.values():
            _check_fits(entry, self.dtype)
        for name, entry in parsed.base_copies.items():
            _check_copy(name, entry, self.base_weight(name))
        return replace(parsed, facts=replace(parsed.facts, warnings=warnings))

    def _trained_rows(self, parsed: ParsedAdapter) -> int:
        """How many rows of the embedding or the lm_head the LoRA adapts."""
        adapts = any(target in (EMBED, LM_HEAD) for _, target in parsed.scales)
        return self.shapes.vocab_size if adapts else 0


def _check_fits(entry: TensorEntry, dtype: torch.dtype) -> None:
    """Raises if a finite value becomes an infinity in the dtype that the server computes with."""
    stored = DTYPES[entry.dtype]
    if torch.finfo(stored).max <= torch.finfo(dtype).max:
        return
    for data in pieces(entry):
        if not bool(torch.from_numpy(data).view(stored).to(dtype).isfinite().all()):
            name = str(dtype).removeprefix("torch.")
            raise invalid(
                f"tensor {entry.name} contains more than {name} holds, which this server computes "
                "with: start it with another --dtype"
            )


def _check_copy(name: str, entry: TensorEntry, base: Tensor) -> None:
    """Raises unless a copy equals the base weight, either of them rounded to the other's dtype."""
    if entry.shape != base.shape:
        raise invalid(
            f"tensor {entry.name} has shape {list(entry.shape)}, but the base model's {name} has "
            f"{list(base.shape)}"
        )
    base_X = base.detach().to("cpu").view(-1)
    as_base = as_copy = True
    start = 0
    for data in pieces(entry):
        copy_X = torch.from_numpy(data).view(DTYPES[entry.dtype])
        part_X = base_X[start : start + len(copy_X)]
        as_base = as_base and torch.equal(copy_X.to(base.dtype), part_X)
        as_copy = as_copy and torch.equal(part_X.to(copy_X.dtype), copy_X)
        if not (as_base or as_copy):
            raise unsupported(
                f"tensor {entry.name} differs from the base model's {name}: adapters that change "
                "whole base weights are not supported (resized or trained embeddings)"
            )
        start += len(copy_X)
