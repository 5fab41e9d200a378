"""What does a step of Mistral-7B cost the host on the Triton backend?

Weights, adapters and KV lie on the meta device, and launches, copies and graphs do nothing: what is
left is Python. 32 layers, rows behind 1,000 tokens each, and with LoRAs one of rank 16 a row. CPU
time of the process, one thread, median of the repeats.

    TRITON_INTERPRET=1 python -m benchmarks.gpu.host
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated, Any

import torch
import typer

from benchmarks.report import report
from tests.helpers.launches import launching
from tests.helpers.mock_mistral import MockMistral, mock_heads, mock_lora

ROWS, NODES, RANK = 8, 8, 16
CASES = {
    "8 rows": (False, 1, False),
    "8 rows, 8 LoRAs": (True, 1, False),
    "8 rows, 8 LoRAs, 8 nodes each": (True, NODES, False),
    "8 rows, 8 LoRAs, 8 nodes each, heads": (True, NODES, True),
}


def main(
    repeats: Annotated[int, typer.Option(help="Steps that a timing takes.")] = 101,
    graphs: Annotated[bool, typer.Option(help="False: every kernel is launched.")] = True,
) -> None:
    """Measure and print a table and JSON lines."""
    torch.set_num_threads(1)
    mistral = MockMistral()
    mistral.device.captures = graphs
    loras = [mock_lora(RANK) for _ in range(ROWS)]
    with launching(_nothing):
        rows = [
            {"step": name, "host ms": round(1000 * _seconds(mistral, loras, case, repeats), 2)}
            for name, case in CASES.items()
        ]
    report("Host time of a step, launches faked", rows, graphs=graphs)


def _seconds(
    mistral: MockMistral, loras: list[Any], case: tuple[bool, int, bool], repeats: int
) -> float:
    adapted, nodes, drafting = case
    heads = mock_heads(4, 4096) if drafting else None
    batch = mistral.step(ROWS, loras if adapted else (), nodes, heads)
    for _ in range(4):  # until the step is a graph
        mistral.backend.forward(batch, mistral.kv)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        mistral.backend.forward(batch, mistral.kv)
        times.append(time.process_time() - began)
    return statistics.median(times)


def _nothing(*args: object, **settings: object) -> None:
    """In place of a launch."""


if __name__ == "__main__":
    typer.run(main)
