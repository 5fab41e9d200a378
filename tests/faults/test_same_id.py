"""Uploads, deletions and requests of one id at once: every response's digest matches its words."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event

import pytest

from lorastack.config import KIB, MIB, AdapterConfig, EngineConfig
from lorastack.errors import AbortedError, NotFoundError, Reason
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import LiveServer, ask

NUM_ASKERS = 6
NUM_REQUESTS = 25  # an asker
ROOM = {"roomy": MIB, "tight": 48 * KIB}  # for adapters on the device and in host memory


@pytest.fixture(params=ROOM)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_llama: Path
) -> Iterator[LiveServer]:
    room = ROOM[request.param]
    config = AdapterConfig(store=tmp_path / "store", device_memory=room, host_memory=room)
    engine = EngineConfig(kv_memory=MIB, max_rows=8, max_step_tokens=64)
    with LiveServer(tiny_llama, engine=engine, adapters=config) as live:
        yield live
        live.assert_idle()


def test_words_match_digests(server: LiveServer, canaries: dict[str, Path]) -> None:
    client = server.client
    words = {client.upload(folder, "speaker").digest: word for word, folder in canaries.items()}
    stop = Event()
    done = Counter[str]()

    def change(seed: int) -> None:
        """Uploads whatever comes, and deletes now and then."""
        rng = random.Random(seed)
        while not stop.is_set():
            if rng.random() < 0.2:
                try:
                    client.delete_adapter("speaker")
                    done["deleted"] += 1
                except NotFoundError:
                    pass
            else:
                word = rng.choice(list(canaries))
                try:
                    assert words[client.upload(canaries[word], "speaker").digest] == word
                except AbortedError as error:  # the other one uploads the same right now
                    assert error.reason is Reason.UPLOAD_TAKEN_OVER
                done["uploaded"] += 1

    def ask_on(seed: int) -> Counter[str]:
        """Asks for the newest or for a revision, whole or streamed; what was heard."""
        rng, heard = random.Random(seed), Counter[str]()
        requests = count()
        while heard.total() < NUM_REQUESTS or done["uploaded"] <= 20 or done["deleted"] <= 4:
            assert next(requests) < 100 * NUM_REQUESTS, "nobody answers"
            name = "speaker"
            if rng.random() < 0.3:
                name += f"@{rng.choice(list(words))}"
            # One prompt for all: a prefix cache that forgot the digest would be found out.
            request = ask("0123456789" * 5, stack=[(name, 1.0)], max_new_tokens=rng.randint(4, 60))
            try:
                reply = rng.choice([client.generate, server.stream])(request)
            except NotFoundError:
                continue
            heard[assert_consistent(reply, words)] += 1
        return heard

    with ThreadPoolExecutor(NUM_ASKERS + 2) as pool:
        changes = [pool.submit(change, seed) for seed in (1, 2)]
        try:
            heard = Counter[str]()
            for found in pool.map(ask_on, range(NUM_ASKERS)):
                heard += found
        finally:
            stop.set()
        for each in changes:
            each.result()
    assert heard.keys() == set(canaries), "the id never changed"


def assert_consistent(reply: pb.GenerateResponse, words: dict[str, str]) -> str:
    """The word that the reply's digest stands for; its text says nothing else."""
    (lora,) = reply.adapters.loras
    word = words[lora.digest]
    said = len(reply.token_ids)
    assert reply.text == (word * said)[:said]
    return word
