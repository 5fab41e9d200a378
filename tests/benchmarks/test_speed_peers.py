"""The speed benchmark with made-up engines: what one peer does costs no other its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import process
from benchmarks.speed import __main__ as speed
from benchmarks.speed import peers as loading
from benchmarks.speed import run as running
from benchmarks.speed.cases import Case, Prompts
from benchmarks.speed.engines import Reply
from benchmarks.speed.peers import Peers, loaded_peers
from benchmarks.speed.results import AUTO, BANDWIDTH, MATHS, OFF
from benchmarks.speed.run import Run
from lorastack.client import GetModelInfoResponse, TokenizeRequest
from lorastack.v1 import generation_pb2 as pb
from tests.helpers import peer_scripts
from tests.test_layering import ROOT

CASES = [
    Case(key="1", name="one", loras=((),)),
    Case(key="loras", name="loras", loras=(("a",), ("b",))),
]
# Fails at the second case of round 1: one job compares first tokens, two warm up.
FAILS_LATE = """
counted = []
def generated(job):
    counted.append(job)
    if len(counted) == 5:
        raise ValueError("no room")
    return Done(1.0, 2.0, 8, [[row[0]] * job.new_tokens for row in job.prompts])
"""
OTHER_MODEL = (
    "def generated(job): return Done(1, 1, 1, [[7] * job.new_tokens for _ in job.prompts])"
)


class Server:
    """Says each prompt's first token again; a first token a second after the request."""

    def run(self, function: Callable[..., Any], address: str, requests: list[bytes]) -> list[Reply]:
        replies = []
        for sent in map(pb.GenerateRequest.FromString, requests):
            tokens = [sent.token_ids.ids[0]] * sent.stop.max_new_tokens
            replies.append(Reply(0.0, 1.0, 1.0 + len(tokens) / 10, tokens))
        return replies


class Tokenizer:
    def tokenize(self, request: TokenizeRequest) -> list[int]:
        return [1, 2, 3]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where peers are looked for."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(process, "FOLDER", tmp_path / "one" / "peers")
    monkeypatch.setattr(loading, "default_model", lambda: Path("model"))
    monkeypatch.setattr(loading, "gguf_file", lambda model, scratch, kind: f"{kind}.gguf")
    monkeypatch.setattr(running, "bandwidth", lambda repeats: 100.0)
    return tmp_path / "one" / "peers"


@contextmanager
def measured(
    folder: Path, wanted: Sequence[str], rounds: int, cases: list[Case]
) -> Iterator[tuple[Run, Peers]]:
    server: Any = Server()
    tokenizer: Any = Tokenizer()
    with loaded_peers(wanted, {}, threads=2, scratch=folder) as peers:
        run = Run("address", server, server, peers, Prompts(tokenizer))
        run.check()
        for number in range(rounds + 1):
            run.round(cases, {MATHS}, number)
        yield run, peers


def test_a_peer_that_dies_keeps_its_numbers_and_takes_no_others(folder: Path) -> None:
    peer_scripts.install(folder, "openvino", FAILS_LATE)
    peer_scripts.install(folder, "peft")
    with measured(folder, process.USUAL, 2, CASES) as (run, peers):
        run.results.set_floor("one", 1, 10)
        run.results.set_floor("loras", 2, 10)
        one, loras = run.results.table([OFF, AUTO, *peers.about])
        table = {row["engine"]: row for row in peers.table()}
    assert list(peers.about) == ["openvino", "peft"]
    assert table["llama_cpp"]["left out"] == "not installed; `make peers` does it"
    assert table["openvino"]["left out"] == ("loras, round 1: exit status 1: ValueError: no room")
    assert table["openvino"]["rows as ours"] == "8 of 8"
    assert table["peft"]["left out"] == ""
    assert (one["openvino"], loras["openvino"]) == ("4.0", "-")
    assert (one["peft"], loras["peft"]) == ("1.5", "1.5")
    assert "-" not in {one[OFF], one[AUTO], loras[OFF], loras[AUTO]}
    assert len(run.results.values["loras"][OFF]) == 2
    assert set(run.results.values["loras"]) == {BANDWIDTH, OFF, AUTO, "peft"}


def test_peers_that_do_not_load_are_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    peer_scripts.install(folder, "llama_cpp", "def loaded(): os.abort()")
    peer_scripts.install(folder, "openvino", "print('rubbish', flush=True)")
    peer_scripts.install(folder, "peft", "def loaded(): raise ValueError('bf16 is not supported')")
    with measured(folder, process.USUAL, 1, CASES) as (run, peers):
        reasons = [row["left out"] for row in peers.table()]
        (rows, *_) = run.results.heads_table()
    assert reasons == [
        "loading: SIGABRT: a library's words",
        "loading: wrong output: 'rubbish'",
        "loading: exit status 1: ValueError: bf16 is not supported",
    ]
    assert rows["tokens/s"] != "-"


def test_a_peer_with_another_model_is_left_out(folder: Path) -> None:
    peer_scripts.install(folder, "peft", OTHER_MODEL)
    with measured(folder, ["peft"], 1, CASES[:1]) as (run, peers):
        (row,) = peers.table()
    assert row["left out"] == "wrong output: 0 of 8 rows begin as ours"
    assert set(run.results.values["one"]) == {BANDWIDTH, OFF, AUTO}


def test_floors_are_of_the_numbers_that_run(
    folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "default_model", lambda: tiny_llama)
    with measured(folder, [], 1, CASES) as (run, _):
        steps = {}
        for dtype in (torch.bfloat16, torch.float32):
            info = GetModelInfoResponse(dtype=str(dtype).removeprefix("torch."))
            speed.set_floors(run, CASES, info, {"a": 5, "b": 7})
            steps[dtype] = dict(run.results.step_bytes)
    assert steps[torch.float32]["one"] == 2 * steps[torch.bfloat16]["one"]
    assert all(by_case["loras"] == by_case["one"] + 12 for by_case in steps.values())


def test_the_report_names_what_ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASTACK_ISA", "avx2")
    peer_scripts.install(folder, "peft")
    info = GetModelInfoResponse(backend="native avx2", dtype="bfloat16", version="1")
    with measured(folder, ["peft"], 1, []) as (run, peers):
        ours, other = speed.summary(run, info, peers, threads=2).engines
    assert (ours["numbers"], ours["instructions"]) == (
        "bfloat16",
        "native avx2 (LORASTACK_ISA=avx2)",
    )
    assert (other["numbers"], other["instructions"]) == ("float32", "AVX2")
