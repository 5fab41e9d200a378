"""Which modules a PEFT config adapts, and with which scale: PEFT's own matching rules.

Source: peft 0.21 `check_target_module_exists`, `get_pattern_key` and `LoraLayer.update_layer`,
compared with the real package in tests/adapters/test_peft_parity.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from lorastack.adapters.formats.patterns import Names
from lorastack.layout import EMBED, GROUPS, LM_HEAD, NO_LAYER, ModelShapes

_MLP = (*GROUPS[2], *GROUPS[3])

ValueT = TypeVar("ValueT", int, float)


class Adapted(NamedTuple):
    """How one module is adapted."""

    rank: int
    scale: float


def module_names(shapes: ModelShapes) -> dict[str, tuple[int, str]]:
    """Hugging Face module name -> (layer, target) of everything a LoRA can adapt."""
    names = {"model.embed_tokens": (NO_LAYER, EMBED), "lm_head": (NO_LAYER, LM_HEAD)}
    for layer in range(shapes.num_layers):
        for group in GROUPS:
            for target in group:
                block = "mlp" if target in _MLP else "self_attn"
                names[f"model.layers.{layer}.{block}.{target}"] = (layer, target)
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRules:
    """The fields of an adapter_config.json that choose modules, ranks and scales."""

    target_modules: frozenset[str] | str  # names or suffixes; a string is a pattern
    exclude_modules: frozenset[str] | str
    layers_to_transform: frozenset[int] | None  # None: all
    layers_pattern: tuple[str, ...]
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def resolve(self, modules: Mapping[str, tuple[int, str]]) -> dict[str, Adapted]:
        """The modules that PEFT would wrap (names without `base_model.model.`), and how.

        Raises InvalidArgumentError for a bad pattern, or ones that take too many steps.
        """
        names = Names(modules)
        ranks = _by_pattern(names, self.rank_pattern, "rank_pattern")
        alphas = _by_pattern(names, self.alpha_pattern, "alpha_pattern")
        adapted = {}
        for module in names.listed(self._targeted(names, modules)):
            rank = ranks.get(module, self.rank)
            scale = alphas.get(module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)
            adapted[module] = Adapted(rank, scale)
        return adapted

    def _targeted(self, names: Names, modules: Mapping[str, tuple[int, str]]) -> int:
        excluded = _named(names, modules, self.exclude_modules, "exclude_modules")
        targets = self.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            targeted = names.chosen(name for name in modules if name.startswith("model.layers."))
        else:
            targeted = _named(names, modules, targets, "target_modules")
            if self.layers_to_transform is not None:
                # PEFT asks layers_to_transform about suffixes only.
                targeted &= self._layers(names, modules) | names.chosen(targets)
        return targeted & ~excluded

    def _layers(self, names: Names, modules: Mapping[str, tuple[int, str]]) -> int:
        """The modules of the layers to transform; with layers_patterns, those that one matches."""
        layers = self.layers_to_transform or ()
        in_layers = names.chosen(name for name, (layer, _) in modules.items() if layer in layers)
        named = 0
        for pattern in self.layers_pattern:
            full = rf"(?:^|.*?\.){pattern}\.\d+\..*"
            named |= names.full_matches(full, "layers_pattern")
        return in_layers & named if self.layers_pattern else in_layers


def _by_pattern(names: Names, patterns: Mapping[str, ValueT], field: str) -> dict[str, ValueT]:
    """Module -> the value of the first pattern that matches its name or a suffix of it."""
    values: dict[str, ValueT] = {}
    left = names.everything
    for pattern, value in patterns.items():
        matching = names.suffix_matches(pattern, field) & left
        left ^= matching
        values |= dict.fromkeys(names.listed(matching), value)
    return values


def _named(names: Names, modules: Iterable[str], wanted: frozenset[str] | str, field: str) -> int:
    """The modules that a pattern matches, or that have one of these names or suffixes."""
    if isinstance(wanted, str):
        return names.full_matches(wanted, field) if wanted else 0
    return names.chosen(
        module for module in modules if any(suffix in wanted for suffix in _suffixes(module))
    )


def _suffixes(module: str) -> Sequence[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
