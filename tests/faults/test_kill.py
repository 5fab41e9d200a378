"""kill -9 at random moments of uploads, replaces and deletes (I5)."""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lorastack.adapters.store.manifest import adapter_digest
from lorastack.client import Client
from lorastack.config import MIB
from lorastack.errors import UnavailableError
from tests.adapters.folders import read_folder, specs_of
from tests.faults.conftest import Configure
from tests.faults.store_files import assert_whole
from tests.helpers.live import ask
from tests.helpers.process import ServerProcess

NUM_IDS = 4
KILL_WITHIN = 0.12  # seconds: a few uploads' time
NUM_KILLS = [20, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]


@dataclass(frozen=True)
class State:
    """What an id points to. word: the canary's."""

    word: str
    revision: int


class Caller:
    """Uploads, replaces and deletes one id, and remembers what it may be now.

    acknowledged: the server said so; asked: it was asked for, perhaps without an answer. None:
    there is no such id.
    """

    def __init__(self, adapter_id: str, folders: dict[str, Path], seed: int) -> None:
        self.id = adapter_id
        self.acknowledged: State | None = None
        self.asked: State | None = None
        self._folders = folders
        self._random = random.Random(seed)

    def run(self, server: str) -> None:
        """Until the server dies."""
        with Client(server) as client:
            try:
                while True:
                    self._change(client)
            except UnavailableError:
                return

    def _change(self, client: Client) -> None:
        old = self.acknowledged
        if old is not None and self._random.random() < 0.3:
            self.asked = None
            client.delete_adapter(self.id)
        else:
            word = self._random.choice(list(self._folders))
            changes = old is None or word != old.word
            self.asked = State(word, (old.revision if old else 0) + changes)
            reply = client.upload(self._folders[word], self.id)
            assert reply.revision == self.asked.revision
        self.acknowledged = self.asked

    def settle(self, found: State | None) -> None:
        """After a restart the id is in the state of before or of after what was asked last."""
        assert found in (self.acknowledged, self.asked), self.id
        self.acknowledged = self.asked = found


@pytest.fixture(scope="module")
def folders(canaries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The canaries; one is large enough for an upload of several chunks."""
    large = tmp_path_factory.mktemp("large") / "fjord"
    shutil.copytree(canaries["fjord"], large)
    (large / "README.md").write_bytes(random.Random(0).randbytes(2 * MIB))
    return canaries | {"fjord": large}


@pytest.mark.parametrize("num_kills", NUM_KILLS)
def test_killed_at_random_moments(
    num_kills: int, configure: Configure, folders: dict[str, Path]
) -> None:
    config = configure()
    digests = {word: adapter_digest(specs_of(read_folder(folders[word]))) for word in folders}
    words = {digest: word for word, digest in digests.items()}
    moments = random.Random(num_kills)
    callers = [Caller(f"id-{n}", folders, seed=n) for n in range(NUM_IDS)]
    for _ in range(num_kills):
        with (
            ServerProcess(config) as server,
            Client(server.address) as client,
            ThreadPoolExecutor(NUM_IDS) as pool,
        ):
            listed = {adapter.id: adapter for adapter in client.list_adapters()}
            assert listed.keys() <= {caller.id for caller in callers}
            for caller in callers:
                adapter = listed.get(caller.id)
                state = State(words[adapter.digest], adapter.revision) if adapter else None
                caller.settle(state)
                if state is not None:
                    assert_speaks(client, caller.id, state.word, digests[state.word])
            runs = [pool.submit(caller.run, server.address) for caller in callers]
            time.sleep(moments.uniform(0, KILL_WITHIN))
            server.kill()
            for run in runs:
                run.result()
        assert_whole(config.adapters.store)


def assert_speaks(client: Client, adapter_id: str, word: str, digest: str) -> None:
    reply = client.generate(ask("7", stack=[(adapter_id, 1.0)], max_new_tokens=2 * len(word)))
    assert reply.adapters.loras[0].digest == digest
    assert reply.text == 2 * word
