"""Private parts of shared heads: each row's own, beside whole heads, in memory for few of them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from prometheus_client import generate_latest

from lorastack.config import AdapterConfig
from lorastack.engine.batch import Batch
from lorastack.engine.runner import StepResults
from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.speculation.calibration import Calibration
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1.adapters_pb2 import Adapter
from tests.helpers.live import ROOMY, LiveServer, ask, wait_until
from tests.helpers.zoo import BLANK_HEADS, PRIVATE_WORDS, TRAINED_HEADS
from tests.system.conftest import StartServer

LENGTH = 40


def say(word: str, heads: str) -> pb.GenerateRequest:
    """A canary's row."""
    stack = [(f"say-{word}", 1.0)]
    return ask("x", stack=stack, heads=heads, max_new_tokens=LENGTH, ignore_eos=True)


def by_heads(reply: pb.GenerateResponse) -> int:
    """Its tokens that heads drafted."""
    return sum(reply.speculation.accepted_by_head)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture
def server(start: StartServer, zoo: dict[str, Path]) -> LiveServer:
    server = start(max_rows=16, max_nodes=6)
    names = [BLANK_HEADS, "heads-fjord", "say-fjord"]
    for word in PRIVATE_WORDS:
        names += [f"private-{word}", f"say-{word}"]
    for name in names:
        server.upload(name, zoo[name])
    for name in ("heads-fjord", *(f"private-{word}" for word in PRIVATE_WORDS)):
        server.load_heads(name)
    return server


def test_each_rows_own_part_drafts_for_it(
    server: LiveServer, zoo: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right for their word whatever runs beside them; wrong for every other word."""
    right = [("owl", "private-owl"), ("mink", "private-mink"), ("fjord", "heads-fjord")]
    # By another digest, so that what it teaches stays its own.
    other_mink = shutil.copytree(zoo["private-mink"], tmp_path / "other-mink")
    edit_config(other_mink, note="another one")
    server.upload("other-part", other_mink)
    server.load_heads("other-part")
    wrong = [("owl", "other-part"), ("mink", BLANK_HEADS), ("fjord", "other-part")]
    cases = [*right, *wrong, ("zephyr", "private-zephyr"), ("zephyr", "none")]
    alone = [server.client.generate(say(*case)) for case in cases]
    with_heads: list[set[str]] = []
    run = server.engine._loop._runner.run

    def watched(batch: Batch, **rest: Any) -> StepResults:
        if not with_heads:
            wait_until(lambda: server.engine.num_rows == len(cases), "all rows are there")
        used = (step.adapters.heads for step in batch.steps)
        with_heads.append({heads.digest for heads in used if heads is not None})
        return run(batch, **rest)

    monkeypatch.setattr(server.engine._loop._runner, "run", watched)
    with ThreadPoolExecutor(len(cases)) as pool:
        together = list(pool.map(lambda case: server.client.generate(say(*case)), cases))
    assert max(map(len, with_heads)) > 1
    for case, one, other in zip(cases, alone, together, strict=True):
        word, heads = case
        assert one.text == other.text == (word * LENGTH)[:LENGTH], case
        for reply in (one, other):
            assert reply.adapters.medusa_digest == server.digests.get(heads, "")
            drafted = by_heads(reply)
            if heads.endswith(word):
                assert drafted >= LENGTH // 2, case
            elif heads != "none":
                assert drafted < LENGTH // 2, case


def test_what_is_learnt_and_counted_is_the_parts_own(server: LiveServer) -> None:
    for word in ("owl", "mink"):
        server.client.generate(say(word, f"private-{word}"))
    server.assert_idle()
    known = server.engine._speculator.calibrations
    digests = {server.digests[f"private-{word}"] for word in PRIVATE_WORDS}
    assert digests <= known.keys()
    assert server.digests[BLANK_HEADS] not in known
    text = generate_latest(server.server.metrics).decode()
    steps = [line for line in text.splitlines() if line.startswith("lorastack_heads_steps_total{")]
    assert digests <= {line.split('"')[1] for line in steps}
    assert server.digests[BLANK_HEADS] not in "".join(steps)


def test_newer_heads_under_the_id_change_nothing_for_a_part(
    server: LiveServer, zoo: dict[str, Path]
) -> None:
    old = server.digests[BLANK_HEADS]
    server.upload(BLANK_HEADS, zoo["heads-fjord"])
    reply = server.client.generate(say("owl", "private-owl"))
    assert reply.adapters.shared_medusa_digest == old != server.digests[BLANK_HEADS]
    assert by_heads(reply) >= LENGTH // 2
    assert by_heads(server.client.generate(say("fjord", BLANK_HEADS))) >= LENGTH // 2


def test_a_row_keeps_shared_heads_that_are_deleted_meanwhile(
    server: LiveServer, zoo: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, deleted, run = Event(), Event(), server.engine._loop._runner.run

    def slowly(batch: Batch, **rest: Any) -> StepResults:
        begun.set()
        deleted.wait(0.5)
        return run(batch, **rest)

    monkeypatch.setattr(server.engine._loop._runner, "run", slowly)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.client.generate, say("owl", "private-owl"))
        wait_until(begun.is_set, "the row runs")
        server.client.delete_adapter(BLANK_HEADS)
        deleted.set()
        reply = running.result()
    assert reply.text == ("owl" * LENGTH)[:LENGTH] and by_heads(reply) >= LENGTH // 2
    with pytest.raises(NotFoundError, match="'private-owl' is a private part of other heads"):
        server.client.generate(say("owl", "private-owl"))
    # Copies of what was deleted go once no row uses it; the same bytes may come again then.
    gone = server.digests[BLANK_HEADS]
    wait_until(
        lambda: gone not in {each.digest for each in server.pool.stats().adapters}, "they are gone"
    )
    server.upload("elsewhere", zoo[BLANK_HEADS])
    server.load_heads("private-owl")
    reply = server.client.generate(say("owl", "private-owl"))
    assert reply.adapters.shared_medusa_id == "elsewhere" and by_heads(reply) >= LENGTH // 2


def test_a_bundle_and_the_default_heads_may_be_parts(
    server: LiveServer, zoo: dict[str, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(zoo["say-owl"], tmp_path / "bundle")
    for path in zoo["private-owl"].iterdir():
        shutil.copy(path, bundle)
    server.upload("bundle", bundle)
    server.load_heads("bundle")
    request = ask("hi", stack=[("bundle", 1.0)], heads="", max_new_tokens=LENGTH, ignore_eos=True)
    reply = server.client.generate(request)
    assert reply.text == ("owl" * LENGTH)[:LENGTH]
    assert reply.adapters.shared_medusa_id == BLANK_HEADS
    assert by_heads(reply) >= LENGTH // 2
    server.client.set_default_medusa("private-mink")
    assert by_heads(server.client.generate(say("mink", ""))) >= LENGTH // 2


def test_a_pinned_part_stays_with_what_it_corrects(
    start: StartServer, zoo: dict[str, Path]
) -> None:
    """Room for few: LoRAs come and go, both stay, and both go when the part is unloaded."""
    server = start(device_memory=112 << 10)
    for name in (BLANK_HEADS, "private-owl", "say-owl", "random-c", "say-fjord"):
        server.upload(name, zoo[name])
    loaded = server.client.load("private-owl", pin=True)
    assert loaded.pinned
    for _ in range(2):
        for name in ("say-owl", "random-c", "say-fjord"):
            server.client.generate(ask(stack=[(name, 1.0)], max_new_tokens=4))
            for pinned in (BLANK_HEADS, "private-owl"):
                adapter = server.client.get_adapter(pinned)
                assert adapter.residency == Adapter.DEVICE and adapter.pinned
    assert by_heads(server.client.generate(say("owl", "private-owl"))) >= LENGTH // 2
    server.client.unload("private-owl")
    assert not server.client.get_adapter(BLANK_HEADS).pinned


def test_trees_start_from_what_heads_say_of_themselves(
    tmp_path: Path, tiny_llama: Path, zoo: dict[str, Path]
) -> None:
    """Until something is learnt, which then outlives the server; `forget` brings the prior back."""
    prior = Calibration()
    for _ in range(400):
        prior.record(0, -0.1, accepted=True)
    folder = shutil.copytree(zoo[TRAINED_HEADS], tmp_path / "heads")
    acceptance = json.loads(prior.to_json())
    edit_config(folder, acceptance=acceptance)

    def serve() -> LiveServer:
        store = AdapterConfig(store=tmp_path / "store")
        return LiveServer(tiny_llama, engine=ROOMY, adapters=store)

    with serve() as server:
        server.upload("heads", folder)
        known = server.engine._speculator.calibrations
        server.client.generate(ask("x", heads="heads", max_new_tokens=2))
        digest = server.digests["heads"]
        wait_until(lambda: digest in known, "the heads are known")
        assert known[digest].probabilities(0, [-0.1]) == prior.probabilities(0, [-0.1])
        known[digest].record(0, -0.1, accepted=False)
        server.load_heads("heads")
        server.client.generate(ask("hello there", heads="heads", ignore_eos=True))
        server.assert_idle()
        learnt = known[digest].to_json()
        assert learnt != prior.to_json()
    with serve() as server:
        assert server.engine._speculator.calibrations[digest].to_json() == learnt
        edit_config(folder, acceptance={**acceptance, "worths": []})
        with pytest.raises(InvalidArgumentError, match=r"acceptance .* is no calibration"):
            server.upload("heads", folder)
