"""MergeAdapters on a live server: PEFT's tokens, made once, bounded, and kept across restarts."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

from lorastack.adapters.formats.merged import Merge
from lorastack.client import Client, LoraRef
from lorastack.config import AdapterConfig
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.layout import ModelShapes
from lorastack.v1 import adapters_pb2 as ab
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.helpers.reference import Reference, assert_greedy

PAIR = (LoraRef(lora_id="one", scale=0.7), LoraRef(lora_id="two"))


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    root, shapes = tmp_path_factory.mktemp("loras"), tiny_llama_shapes
    bundle = write_lora(root / "bundle", shapes, seed=3, rank=4)
    return {
        "one": write_lora(root / "one", shapes, seed=1, rank=4),
        "two": write_lora(root / "two", shapes, seed=2, rank=4, alpha=3),
        "bundle": write_heads(bundle, shapes.hidden_size, num_heads=2),
        "wide": write_lora(root / "wide", shapes, seed=4, rank=5),
        "heads": write_heads(root / "heads", shapes.hidden_size, num_heads=2),
    }


def serve(model: Path, store: Path, *, read_only: bool = False) -> LiveServer:
    adapters = AdapterConfig(store=store, max_merged=3, read_only_store=read_only)
    return LiveServer(model, engine=ROOMY, adapters=adapters)


@pytest.fixture
def server(tmp_path: Path, tiny_llama: Path, folders: dict[str, Path]) -> Iterator[LiveServer]:
    with serve(tiny_llama, tmp_path / "store") as server:
        server.upload_all(folders)
        yield server


def merged_ids(client: Client) -> list[str]:
    return [adapter.id for adapter in client.list_adapters("merged/")]


def test_tokens_are_those_of_pefts_merge(
    server: LiveServer, tiny_llama: Path, folders: dict[str, Path]
) -> None:
    adapter = server.client.merge(PAIR, "ties", 0.7, majority_sign="frequency")
    assert (adapter.kind, adapter.rank, adapter.alpha) == (ab.Adapter.LORA, 4, 4)
    reference = Reference(tiny_llama, {name: folders[name] for name in ("one", "two")})
    reference._model.add_weighted_adapter(
        ["one", "two"],
        [0.7, 1.0],
        "merged",
        combination_type="ties",
        density=0.7,
        majority_sign_method="frequency",
    )
    outputs = []
    for prompt in ("hello there", "The quick brown fox"):
        request = ask(prompt, stack=((adapter.id, 1.0),), max_new_tokens=32, ignore_eos=True)
        reply = server.client.generate(request)
        outputs.append((server.tokenize(prompt), (("merged", 1.0),), reply.token_ids))
    assert_greedy(reference, outputs)


def test_equal_requests_compute_once_and_survive_a_restart(
    tmp_path: Path, tiny_llama: Path, folders: dict[str, Path]
) -> None:
    with serve(tiny_llama, tmp_path / "store") as server:
        server.upload_all(folders)
        with patch.object(Merge, "write", autospec=True, side_effect=Merge.write) as write:
            with ThreadPoolExecutor(8) as threads:
                running = [
                    threads.submit(server.client.merge, PAIR, "dare_ties", 0.5) for _ in range(8)
                ]
                replies = [each.result() for each in running]
            assert {(reply.id, reply.digest) for reply in replies} == {
                (replies[0].id, replies[0].digest)
            }
            assert write.call_count == 1
            first = replies[0]
            assert server.client.merge(PAIR, "dare_ties", 0.3).id != first.id
            assert server.client.merge(PAIR[::-1], "dare_ties", 0.5).id != first.id
            assert write.call_count == 3
            server.client.delete_adapter(first.id)
            assert server.client.merge(PAIR, "dare_ties", 0.5).digest == first.digest
    with serve(tiny_llama, tmp_path / "store", read_only=True) as server:
        assert server.client.merge(PAIR, "dare_ties", 0.5).digest == first.digest
        with pytest.raises(FailedPreconditionError) as caught:
            server.client.merge(PAIR, "ties", 0.5)
        assert caught.value.reason is Reason.STORE_READ_ONLY


def test_the_least_recently_used_goes_unless_it_is_pinned(server: LiveServer) -> None:
    client = server.client
    made = [client.merge(PAIR, "ties", density).id for density in (0.25, 0.5, 0.75)]
    client.load(made[0], pin=True)
    client.merge(PAIR, "ties", 0.5)  # used: now the third is the oldest
    fourth = client.merge(PAIR, "ties", 1.0).id
    assert set(merged_ids(client)) == {made[0], made[1], fourth}
    for name in (made[1], fourth):
        client.load(name, pin=True)
    with pytest.raises(ResourceExhaustedError) as caught:
        client.merge(PAIR, "dare_linear", 0.5)
    assert caught.value.reason is Reason.STORE_FULL
    assert client.merge(PAIR, "ties", 1.0).id == fourth


def test_heads_of_a_bundle_stay_out_and_a_sign_does_not_matter_to_dare_linear(
    server: LiveServer,
) -> None:
    loras = [LoraRef(lora_id="one"), LoraRef(lora_id="bundle", scale=-1.0)]
    merged = server.client.merge(loras, "dare_linear", 0.5)
    assert (merged.kind, merged.num_heads) == (ab.Adapter.LORA, 0)
    again = server.client.merge(loras, "dare_linear", 0.5, majority_sign="frequency")
    assert again.id == merged.id


@pytest.mark.parametrize(
    ("names", "density", "error", "words"),
    [
        (["one"], 0.5, InvalidArgumentError, "at least 2"),
        ([], 0.5, InvalidArgumentError, "at least 2"),
        (["one", "one"], 0.5, InvalidArgumentError, "duplicates"),
        (["one", "copy"], 0.5, InvalidArgumentError, "same adapter twice"),
        (["one", "heads"], 0.5, InvalidArgumentError, "not a LoRA"),
        (["one", "wide"], 0.5, InvalidArgumentError, "rank 5"),
        (["one", "nobody"], 0.5, NotFoundError, "nobody"),
        (["one", "two"], 0.0, InvalidArgumentError, "density"),
        (["one", "two"], 1.5, InvalidArgumentError, "density"),
        (["one", "two"], float("nan"), InvalidArgumentError, "density"),
        (["one"] * 17, 0.5, InvalidArgumentError, "at most 16"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    server: LiveServer,
    folders: dict[str, Path],
    names: list[str],
    density: float,
    error: type[LorastackError],
    words: str,
) -> None:
    if "copy" in names:
        server.upload("copy", folders["one"])
    with pytest.raises(error, match=words):
        server.client.merge([LoraRef(lora_id=name) for name in names], "ties", density)
    assert merged_ids(server.client) == []


def test_odd_requests_are_refused(server: LiveServer, folders: dict[str, Path]) -> None:
    client = server.client
    for scale in (float("nan"), float("inf"), 1e7):
        with pytest.raises(InvalidArgumentError, match="scale"):
            client.merge([PAIR[0], LoraRef(lora_id="two", scale=scale)], "ties", 0.5)
    with pytest.raises(InvalidArgumentError, match="strategy"):
        client.merge(PAIR, "linear", 0.5)  # type: ignore[arg-type]
    for fields, words in (({}, "strategy"), ({"strategy": 9}, "strategy")):
        request = ab.MergeAdaptersRequest(loras=PAIR, density=0.5, **fields)
        with pytest.raises(InvalidArgumentError, match=words):
            client._call(client._adapters.MergeAdapters, request, None)
    with pytest.raises(InvalidArgumentError, match="merged/"):
        client.upload(folders["one"], "merged/mine")
