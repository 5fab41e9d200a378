"""What is known about an adapter, beside its files: one list for all that keep or show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorastack.adapters.formats.alias import Alias
from lorastack.layout import AdapterKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a folder's configs and tensors say, and validation found out."""

    kind: AdapterKind
    base_model: str  # the name in its config; "" if it names none
    rank: int  # the largest of any module; 0 without a LoRA
    alpha: float
    target_modules: tuple[str, ...]
    num_heads: int
    num_layers: int  # blocks a head; 0 without heads
    medusa_version: int  # 0 without heads
    warnings: tuple[str, ...] = ()  # what its owner should know
    alias: Alias | None = None  # what an alias stands for; None for every other kind

    def to_json(self) -> dict[str, object]:
        """The fields as `from_json` takes them: JSON values; `alias` only of an alias."""
        lists = {"target_modules": list(self.target_modules), "warnings": list(self.warnings)}
        fields = {**asdict(self), **lists, "kind": self.kind.value}
        del fields["alias"]
        return fields if self.alias is None else {**fields, "alias": self.alias.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Facts:
        """From parsed JSON. Raises KeyError, TypeError, ValueError or InvalidArgumentError.

        Manifests of older versions have no warnings.
        """
        alias = Alias.from_json(fields["alias"]) if "alias" in fields else None
        tuples = {
            "target_modules": tuple(fields["target_modules"]),
            "warnings": tuple(fields.get("warnings", ())),
        }
        return cls(**{**fields, **tuples, "kind": AdapterKind(fields["kind"]), "alias": alias})
