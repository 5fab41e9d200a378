"""What is known about an adapter, beside its files: one list for all that keep or show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lorastack.adapters.formats.alias import Alias
from lorastack.layout import AdapterKind


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedHeads:
    """The heads that a private part corrects.

    sha256: lower-case hex, of their weights' file, which alone says which heads they are. id: what
    they were stored as where the part was made; it may have other revisions by now.
    """

    id: str
    sha256: str


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
    shared_heads: SharedHeads | None = None  # of a private part of heads; None for whole heads
    private_rank: int = 0  # of a private part
    acceptance: str = ""  # what adaptive trees start from, a calibration's JSON; "" if not given

    def to_json(self) -> dict[str, object]:
        """The fields as `from_json` takes them: JSON values; what few adapters have only if set."""
        lists = {"target_modules": list(self.target_modules), "warnings": list(self.warnings)}
        fields = {**asdict(self), **lists, "kind": self.kind.value}
        fields["alias"] = None if self.alias is None else self.alias.to_json()
        rare = ("alias", "shared_heads", "private_rank", "acceptance")
        return {name: value for name, value in fields.items() if value or name not in rare}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Facts:
        """From parsed JSON. Raises KeyError, TypeError, ValueError or InvalidArgumentError.

        Manifests of older versions have no warnings.
        """
        alias = Alias.from_json(fields["alias"]) if "alias" in fields else None
        shared = SharedHeads(**fields["shared_heads"]) if "shared_heads" in fields else None
        typed = {
            "kind": AdapterKind(fields["kind"]),
            "target_modules": tuple(fields["target_modules"]),
            "warnings": tuple(fields.get("warnings", ())),
            "alias": alias,
            "shared_heads": shared,
        }
        return cls(**{**fields, **typed})
