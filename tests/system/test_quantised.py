"""Servers of quantised weights: they say so, and speculation and company change no token (I1)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lorastack.config import AdapterConfig
from lorastack.kernels.native.library import library
from lorastack.kernels.quantize import Kind
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.helpers.zoo import BUNDLE, FAMILIAR, TRAINED_HEADS

# In float32 torch's products hardly depend on the number of rows; its bfloat16 ones do.
DTYPES = ["float32", "bfloat16"] if library() else ["float32"]
STACKS: tuple[tuple[tuple[str, float], ...], ...] = (
    (),
    (("random-a", 1.0),),
    (("random-b", 0.5), ("random-c", 1.0)),
    ((BUNDLE, 1.0),),
)
HEADS = ("none", TRAINED_HEADS, "heads-own", "heads-5")


@pytest.fixture(
    scope="module", params=[(kind, dtype) for kind in Kind for dtype in DTYPES], ids=str
)
def server(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    zoo: dict[str, Path],
) -> Iterator[LiveServer]:
    kind, dtype = request.param
    store = AdapterConfig(store=tmp_path_factory.mktemp("quantised") / "store")
    with LiveServer(tiny_llama, engine=ROOMY, adapters=store, dtype=dtype, quantize=kind) as live:
        names = {name for stack in STACKS for name, _ in stack} | set(HEADS[1:])
        live.upload_all({name: zoo[name] for name in names})
        info = live.client.model_info()
        assert info.quantization == kind
        assert info.dtype == dtype
        assert info.backend.startswith("native" if dtype == "bfloat16" else "torch")
        yield live


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=str)
def test_auto_equals_off(server: LiveServer, sampling: dict[str, float]) -> None:
    cases = [
        (prompt, STACKS[(index + number) % len(STACKS)], heads)
        for index, prompt in enumerate(FAMILIAR)
        for number, heads in enumerate(HEADS)
    ]

    def run(case: tuple[str, tuple[tuple[str, float], ...], str], off: bool) -> pb.GenerateResponse:
        prompt, stack, heads = case
        return server.client.generate(
            ask(prompt, stack=stack, heads=heads, off=off, ignore_eos=True, sampling=sampling)
        )

    for heads in HEADS[1:]:
        server.load_heads(heads)
    with ThreadPoolExecutor(8) as pool:
        auto = list(pool.map(lambda case: run(case, False), cases))
    off = [run(case, True) for case in cases]
    for case, drafted, plain in zip(cases, auto, off, strict=True):
        assert drafted.token_ids == plain.token_ids, case
    accepted = sum(reply.speculation.accepted_tokens for reply in auto)
    assert 0 < accepted < sum(reply.speculation.drafted_tokens for reply in auto)
    server.assert_idle()
