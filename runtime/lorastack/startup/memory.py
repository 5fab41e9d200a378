"""Refuses a model that does not fit the machine's memory, before it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorastack.config import GIB, MIB
from lorastack.errors import FailedPreconditionError, Reason
from lorastack.layout import ModelShapes
from lorastack.model.kv import page_nbytes

log = logging.getLogger(__name__)

LEAST_KV = 64 * MIB  # bytes; neither the default nor advice is less
KV_SHARE = 0.8  # of what a CUDA device has left; the rest is for fragments and long prompts
RESERVE = 2 * GIB  # bytes of a CUDA device: its context, activations, workspaces, compiled kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Bytes that a server may come to need.

    kv and adapters are what --kv-memory and --device-adapter-memory allow: they fill up as rows and
    adapters come, and there must be room for that. The host's cache of adapters is not counted:
    its limit is generous by default, and most servers never see so many adapters.
    """

    weights: int
    kv: int
    adapters: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.adapters


def available_memory(device: torch.device) -> int | None:
    """Bytes that weights, KV and adapters may take on a device; None if it is not known."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - RESERVE)
    return host_memory()


def default_kv(device: torch.device, left: int, most: int) -> int:
    """Bytes for keys and values where nobody says how many.

    left: those that weights and adapters leave. most: on a CPU. A GPU's memory is there for the
    engine alone.
    """
    return max(LEAST_KV, int(KV_SHARE * left) if device.type == "cuda" else min(most, left))


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that Linux calls available, or fewer where a cgroup allows fewer; None elsewhere.

    root: the folder of proc and sys.
    """
    available = _table(root / "proc/meminfo").get("MemAvailable:")
    if available is None:
        return None
    return min([available * 1024, *_cgroup_rooms(root)])


def pinned_memory(wanted: int, available: int | None) -> int:
    """Bytes of the host to page-lock for adapters on their way to a GPU: `wanted` or fewer.

    available: what the host has left, of which at most half is taken: the system can lend none of
    it to others, nor move it out.
    """
    most = wanted if available is None else available // 2
    if wanted <= most:
        return wanted
    log.warning(
        "--host-adapter-memory: %s would be page-locked, but %s are available here: adapters get "
        "%s of the host's memory",
        *map(_size, (wanted, available or 0, most)),
    )
    return most


def check_fits(
    demand: Demand, available: int, others: Mapping[str, int], where: str = "here"
) -> None:
    """Raises FailedPreconditionError, with advice, for a demand of more than `available` bytes.

    others: options that were not given -> bytes of the weights with them. where: the bytes are.
    """
    if demand.total <= available:
        return
    advice = list(_advice(demand, available, others))
    raise FailedPreconditionError(
        f"the weights take {_size(demand.weights)}, --kv-memory {_size(demand.kv)} and "
        f"--device-adapter-memory {_size(demand.adapters)}, {_size(demand.total)} together, but "
        f"{_size(available)} are available {where}: "
        + (", or ".join(advice) if advice else "take a smaller model or a machine with more"),
        reason=Reason.INVALID_MODEL,
    )


def count_pages(shapes: ModelShapes, dtype: torch.dtype, kv_memory: int, page_size: int) -> int:
    """Pages of `page_size` tokens that kv_memory bytes hold.

    Raises FailedPreconditionError for fewer than two.
    """
    nbytes = page_nbytes(shapes, page_size, dtype)
    num_pages = kv_memory // nbytes
    if num_pages < 2:
        raise FailedPreconditionError(
            f"--kv-memory holds {num_pages} pages of {nbytes} bytes; give it at least "
            f"{page_nbytes(shapes, shapes.max_context, dtype)} bytes for one full context",
            reason=Reason.INVALID_MODEL,
        )
    return num_pages


def _advice(demand: Demand, available: int, others: Mapping[str, int]) -> Iterator[str]:
    """Changes, each of which is enough alone."""
    room = available - demand.weights
    if roomy := (kv := room - demand.adapters) >= LEAST_KV:
        yield f"give --kv-memory {kv // MIB}MiB"
    if (adapters := room - demand.kv) >= LEAST_KV:
        yield f"give --device-adapter-memory {adapters // MIB}MiB"
    for option, weights in others.items():
        total = weights + demand.kv + demand.adapters
        kv = available - weights - demand.adapters
        if total <= available:
            yield f"{option}, which needs {_size(total)} in all"
        elif not roomy and kv >= LEAST_KV:
            yield f"{option} with --kv-memory {kv // MIB}MiB"


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"


def _cgroup_rooms(root: Path) -> Iterator[int]:
    """Bytes that each cgroup above this process has left, those that cache files included."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, usage, files = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            folder, files = root / "sys/fs/cgroup/memory", "total_"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and the cgroup itself stand at the top.
        for name in ("", *path.strip("/").split("/")):
            folder = folder / name
            most, used = _number(folder / limit), _number(folder / usage)
            if most is None or used is None:
                continue
            cached = _table(folder / "memory.stat")
            kept = sum(cached.get(f"{files}{kind}_file", 0) for kind in ("active", "inactive"))
            yield max(0, most - used + kept)


def _table(path: Path) -> dict[str, int]:
    """The lines `name number ...` of a file; {} if there is none."""
    return {name: int(number) for name, number, *_ in map(str.split, _lines(path))}


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", or if there is no file."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
