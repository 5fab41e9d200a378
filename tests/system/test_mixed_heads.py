"""Heads of both versions, of many lengths and depths, side by side in one server's batches."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pytest import LogCaptureFixture
from safetensors.torch import load_file, save_file

from lorastack.layout import ModelShapes
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.adapters import with_outputs, write_heads
from tests.helpers.live import LiveServer, ask
from tests.helpers.zoo import FAMILIAR, NARROW_HEADS, TRAINED_HEADS
from tests.system.conftest import StartServer

TRAINED = (TRAINED_HEADS, "wise-as-one", NARROW_HEADS)
RANDOM = ("deep", "deep-own")


@pytest.fixture
def server(
    start: StartServer, tmp_path: Path, tiny_llama: Path, zoo: dict[str, Path]
) -> LiveServer:
    server = start(max_rows=16, max_nodes=6)
    output_VH = load_file(tiny_llama / "model.safetensors")["model.embed_tokens.weight"]  # tied
    vocabulary, hidden = output_VH.shape
    folders = {
        TRAINED_HEADS: zoo[TRAINED_HEADS],
        NARROW_HEADS: zoo[NARROW_HEADS],
        "wise-as-one": with_outputs(tmp_path / "wise-as-one", zoo[TRAINED_HEADS], output_VH),
        "deep": write_heads(tmp_path / "deep", hidden, num_heads=2, num_blocks=2),
        "deep-own": write_heads(
            tmp_path / "deep-own", hidden, num_heads=5, num_blocks=3, vocab_size=vocabulary
        ),
    }
    server.upload_all(folders)
    for name in folders:
        server.load_heads(name)
    return server


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 7}], ids=str)
def test_rows_of_all_kinds_of_heads_give_what_no_heads_give(
    server: LiveServer, sampling: dict[str, float]
) -> None:
    names = (*TRAINED, *RANDOM, "none")
    cases = [(prompt, heads) for prompt in FAMILIAR[:4] for heads in names]

    def run(case: tuple[str, str]) -> pb.GenerateResponse:
        prompt, heads = case
        request = ask(prompt, heads=heads, max_new_tokens=40, ignore_eos=True, sampling=sampling)
        return server.client.generate(request)

    with ThreadPoolExecutor(len(names)) as pool:
        replies = dict(zip(cases, pool.map(run, cases), strict=True))
    for (prompt, heads), reply in replies.items():
        assert reply.token_ids == replies[prompt, "none"].token_ids, (prompt, heads)
    for heads in TRAINED:
        assert sum(sum(replies[p, heads].speculation.accepted_by_head) for p in FAMILIAR[:4])
    sources = {s.source for p in FAMILIAR[:4] for s in replies[p, "none"].speculation.by_source}
    assert pb.Token.HEADS not in sources


def test_heads_that_overflow_are_named_and_their_rows_go_on(
    server: LiveServer, tmp_path: Path, tiny_llama_shapes: ModelShapes, caplog: LogCaptureFixture
) -> None:
    folder = write_heads(tmp_path / "loud", tiny_llama_shapes.hidden_size)
    path = folder / "medusa_lm_head.safetensors"
    save_file({name: 3e38 * tensor.sign() for name, tensor in load_file(path).items()}, path)
    server.upload("loud", folder)
    server.load_heads("loud")
    for prompt in FAMILIAR[:2]:
        plain, loud = (
            server.client.generate(ask(prompt, heads="loud", off=off, ignore_eos=True))
            for off in (True, False)
        )
        assert loud.token_ids == plain.token_ids
        assert pb.Token.HEADS not in {each.source for each in loud.speculation.by_source}
    digest = server.digests["loud"]
    assert server.engine.heads_failures[digest] > 1
    assert [digest in message for message in caplog.messages].count(True) == 1
