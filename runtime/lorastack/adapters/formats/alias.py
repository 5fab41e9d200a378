"""Aliases: a name for a whole selection of LoRAs and heads. Its folder is one file, alias.json.

{"loras": [{"lora_id": "a", "scale": 0.5}, {"lora_id": "b"}], "medusa_id": "h"}
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorastack.adapters.formats.jsonfile import read_object
from lorastack.adapters.formats.refusal import invalid
from lorastack.folders import ALIAS_NAME
from lorastack.request import MAX_LORA_SCALE, MAX_LORAS

MAX_ALIAS = 64 << 10  # bytes of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """What an alias stands for: ids as a request names them, `id@sha256:...` for a revision."""

    loras: tuple[tuple[str, float], ...]  # (id, scale), scales as a request's float32 has them
    medusa_id: str  # "" if it names no heads; "none": no heads

    @property
    def ids(self) -> tuple[str, ...]:
        """All references that it names, "none" too."""
        heads = (self.medusa_id,) if self.medusa_id else ()
        return (*(lora_id for lora_id, _ in self.loras), *heads)

    def to_json(self) -> dict[str, object]:
        """The fields as `from_json` takes them."""
        loras = [{"lora_id": lora_id, "scale": scale} for lora_id, scale in self.loras]
        return {"loras": loras, "medusa_id": self.medusa_id}

    @classmethod
    def from_json(cls, fields: Mapping[str, object]) -> Alias:
        """From parsed JSON. Raises InvalidArgumentError naming the field that is wrong."""
        _check_known(fields, {"loras", "medusa_id"}, ALIAS_NAME)
        loras = fields.get("loras", [])
        if not isinstance(loras, list):
            raise invalid(f"loras of {ALIAS_NAME} must be a list")
        if len(loras) > MAX_LORAS:
            raise invalid(f"{ALIAS_NAME} names {len(loras)} LoRAs; at most {MAX_LORAS} are stacked")
        parsed = tuple(map(_lora, loras))
        names = [lora_id for lora_id, _ in parsed]
        if twice := [name for name in names if names.count(name) > 1]:
            raise invalid(f"{ALIAS_NAME} names the LoRA {twice[0][:200]!r} twice: add the scales")
        medusa_id = fields.get("medusa_id", "")
        if not isinstance(medusa_id, str):
            raise invalid(f"medusa_id of {ALIAS_NAME} must be text")
        if not parsed and not medusa_id:
            raise invalid(f"{ALIAS_NAME} names nothing: give loras, a medusa_id, or both")
        return cls(loras=parsed, medusa_id=medusa_id)


def parse_alias(files: Mapping[str, Path]) -> Alias:
    """The alias of a folder that has an alias.json, given as file name -> path.

    Raises InvalidArgumentError naming the file or field; whether its ids exist is not looked at.
    """
    if others := sorted(files.keys() - {ALIAS_NAME}):
        raise invalid(
            f"{ALIAS_NAME} makes the folder an alias, which holds no other file: take "
            f"{others[0]} out, or {ALIAS_NAME}"
        )
    return Alias.from_json(read_object(files[ALIAS_NAME], ALIAS_NAME, MAX_ALIAS))


def _lora(fields: object) -> tuple[str, float]:
    where = f"loras of {ALIAS_NAME}"
    if not isinstance(fields, dict):
        raise invalid(
            f"{where} must be a list of objects with a lora_id and, if it is not 1, a scale"
        )
    _check_known(fields, {"lora_id", "scale"}, where)
    lora_id, scale = fields.get("lora_id"), fields.get("scale", 1.0)
    if not isinstance(lora_id, str) or not lora_id:
        raise invalid(f"every entry in {where} needs a lora_id, which is text")
    if type(scale) not in (int, float) or not abs(scale) <= MAX_LORA_SCALE:
        raise invalid(
            f"the scale of {lora_id[:200]!r} in {ALIAS_NAME} must be a number between "
            f"{-MAX_LORA_SCALE:.0f} and {MAX_LORA_SCALE:.0f}, got {str(scale)[:64]}"
        )
    return lora_id, float(struct.unpack("<f", struct.pack("<f", scale))[0])


def _check_known(fields: Mapping[str, object], known: set[str], where: str) -> None:
    if unknown := sorted(fields.keys() - known):
        raise invalid(f"{where} has the field {unknown[0][:64]!r}, which means nothing there")
