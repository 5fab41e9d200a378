"""Which modules a PEFT config adapts, and with which scale: PEFT's own matching rules.

Source: peft 0.21 `check_target_module_exists`, `get_pattern_key` and `LoraLayer.update_layer`,
compared with the real package in tests/adapters/test_peft_parity.py. Patterns come from uploads, so
they run in the `regex` package, which can be stopped; the standard one can hang for years.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import regex

from lorastack.adapters.refusal import invalid
from lorastack.layout import EMBED, GROUPS, LM_HEAD, NO_LAYER, ModelShapes

MAX_PATTERN = 4096  # characters
MATCH_SECONDS = 5.0  # for all patterns of one config together
_MLP = (*GROUPS[2], *GROUPS[3])


def module_names(shapes: ModelShapes) -> dict[str, tuple[int, str]]:
    """Hugging Face module name -> (layer, target) of everything a LoRA can adapt."""
    names = {"model.embed_tokens": (NO_LAYER, EMBED), "lm_head": (NO_LAYER, LM_HEAD)}
    for layer in range(shapes.num_layers):
        for group in GROUPS:
            for target in group:
                block = "mlp" if target in _MLP else "self_attn"
                names[f"model.layers.{layer}.{block}.{target}"] = (layer, target)
    return names


class Matcher:
    """Matches patterns of one config within one allowance of time."""

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MATCH_SECONDS
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def fullmatch(self, pattern: str, text: str, field_name: str) -> regex.Match[str] | None:
        """`re.fullmatch`. Raises InvalidArgumentError for a bad or endless pattern."""
        try:
            compiled = self._compiled.get(pattern)
            if compiled is None:
                if len(pattern) > MAX_PATTERN:
                    raise invalid(f"{field_name} has a pattern longer than {MAX_PATTERN}")
                compiled = self._compiled[pattern] = regex.compile(pattern)
            left = max(self._deadline - time.monotonic(), 1e-3)
            return compiled.fullmatch(text, timeout=left, concurrent=True)
        except TimeoutError as error:
            raise invalid(f"{field_name}: matching {pattern[:64]!r} takes too long") from error
        except (regex.error, RecursionError, OverflowError) as error:
            raise invalid(f"{field_name} has the bad pattern {pattern[:64]!r}: {error}") from error


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
    matcher: Matcher = field(default_factory=Matcher)

    def matches(self, module: str) -> bool:
        """True if PEFT would wrap this module (its name without `base_model.model.`)."""
        if self.exclude_modules and self._named(self.exclude_modules, module, "exclude_modules"):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return module.startswith("model.layers.")
            return self._named(self.target_modules, module, "target_modules")
        if module in self.target_modules:
            return True  # PEFT asks layers_to_transform about suffixes only
        return self._named(self.target_modules, module, "target_modules") and self._layer_is_on(
            module
        )

    def _named(self, names: frozenset[str] | str, module: str, field_name: str) -> bool:
        if isinstance(names, str):
            return self.matcher.fullmatch(names, module, field_name) is not None
        return any(suffix in names for suffix in _suffixes(module))

    def _layer_is_on(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        for pattern in patterns:
            full = rf"{pattern}\.(?P<idx>\d+)\..*"
            if match := self.matcher.fullmatch(full, module, "layers_pattern"):
                index = match["idx"]  # None if the pattern's own alternatives left it out
                return index is not None and int(index) in self.layers_to_transform
        return False

    def rank_of(self, module: str) -> int:
        key = self._pattern_key(self.rank_pattern, module, "rank_pattern")
        return self.rank_pattern.get(key, self.rank)

    def alpha_of(self, module: str) -> float:
        key = self._pattern_key(self.alpha_pattern, module, "alpha_pattern")
        return self.alpha_pattern.get(key, self.alpha)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def _pattern_key(self, patterns: Iterable[str], module: str, field_name: str) -> str:
        """The first pattern that matches the module's name or a suffix of it."""
        for pattern in patterns:
            if self.matcher.fullmatch(rf"(.*\.)?({pattern})", module, field_name):
                return pattern
        return module


def _suffixes(module: str) -> Sequence[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
