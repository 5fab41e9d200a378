"""`train heads` from prompts to an adapter that a server serves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorastack.config import MIB, AdapterConfig, EngineConfig
from lorastack.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from lorastack.layout import ModelShapes
from lorastack.speculation.calibration import Calibration
from lorastack.train import pipeline
from lorastack.train.distill import DistillOptions
from lorastack.train.evaluate import EvalRun, evaluate
from lorastack.train.options import TrainOptions
from lorastack.train.pipeline import make_heads
from lorastack.train.publish import Publication
from lorastack.train.start import StartOptions
from tests.helpers.canary import train_layer_canary, write_canary
from tests.helpers.live import LiveServer, ask
from tests.helpers.tiny import build_llama
from tests.train.runs import PROMPTS, contents, heads_run, made

pytestmark = pytest.mark.usefixtures("cheap_steps")


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    tiny_llama_shapes: ModelShapes,
    store: Path,
) -> Iterator[tuple[LiveServer, Path]]:
    """A server and its store, which the runs read meanwhile. Two of its LoRAs repeat a word."""
    folder = tmp_path_factory.mktemp("live")
    root = shutil.copytree(store, folder / "store")
    engine = EngineConfig(kv_memory=16 * MIB, max_rows=8, max_nodes=6)
    with LiveServer(tiny_llama, engine=engine, adapters=AdapterConfig(store=root)) as server:
        server.upload("say-elk", train_layer_canary(folder / "say-elk", tiny_llama, "elk"))
        owl = write_canary(folder / "say-owl", tiny_llama, tiny_llama_shapes, "owl")
        server.upload("say-owl", owl)
        server.client.alias("elks", [("say-elk", 1.0), ("lora-a", 0.05)], "heads")
        yield server, root


@pytest.fixture
def server(live: tuple[LiveServer, Path]) -> LiveServer:
    return live[0]


@pytest.fixture(scope="module")
def root(live: tuple[LiveServer, Path]) -> Path:
    return live[1]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, root: Path) -> Path:
    """The folder that a run for a LoRA makes without interruption."""
    return made(tmp_path_factory.mktemp("plain"), tiny_llama, root, loras=ELK).folder


ELK = (("say-elk", 1.0),)


SELECTIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "base": (),
    "lora": ELK,
    "lm-head": (("say-owl", 1.0),),
    "stack": (*ELK, ("lora-a", 0.05)),
    "alias": (("elks", 1.0),),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_heads_are_stored_and_used(
    name: str, server: LiveServer, root: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    stack, adapter_id = SELECTIONS[name], f"made/{name}"
    run = heads_run(tmp_path, tiny_llama, root, loras=stack, adapter_id=adapter_id)
    if name == "base":  # its answers have no pattern: the heads learn these very ones
        run = replace(run, training=replace(run.training, epochs=30, held_out=0.0))
    publication = Publication(server.server.address, adapter_id, replace=False)
    outcome = make_heads(run, publication=publication)
    assert server.client.get_adapter(adapter_id).digest == outcome.digest
    server.digests[adapter_id] = outcome.digest
    server.load_heads(adapter_id)
    accepted = tokens = 0
    for prompt in PROMPTS:
        # Prompts go through the chat template in training, and so they do here.
        on, off = (
            server.client.generate(chat(prompt, stack=stack, heads=adapter_id, off=off))
            for off in (False, True)
        )
        assert on.token_ids == off.token_ids
        assert on.adapters.medusa_digest == outcome.digest
        accepted += sum(on.speculation.accepted_by_head)
        tokens += len(on.token_ids)
    # Prompt lookup drafts most of a repeated word; zero weights would guess none of it.
    assert accepted > tokens / 20
    # The tiny model has fewer tokens than a draft vocabulary.
    assert not (outcome.folder / "draft_vocabulary.safetensors").exists()


def chat(prompt: str, **fields: Any) -> Any:
    request = ask("", max_new_tokens=24, **fields)
    request.chat.messages.add(role="user", content=prompt)
    return request


def test_a_draft_vocabulary_is_chosen(tiny_llama: Path, root: Path, tmp_path: Path) -> None:
    outcome = made(tmp_path, tiny_llama, root, loras=ELK, draft_vocabulary=64)
    assert outcome.served is not None and outcome.served["tokens_a_step"] > 1.5
    assert outcome.evaluation["draft_vocabulary"]["size"] == 64
    assert (outcome.folder / "draft_vocabulary.safetensors").exists()


def test_a_lora_that_adapts_lm_head_leaves_all_tokens_to_choose(
    tiny_llama: Path, store: Path, tmp_path: Path
) -> None:
    outcome = made(tmp_path, tiny_llama, store, loras=(("lora-b", 1.0),), draft_vocabulary=64)
    assert outcome.evaluation["draft_vocabulary"]["size"] == 0
    assert not (outcome.folder / "draft_vocabulary.safetensors").exists()


def test_a_bundle_has_the_loras_own_files(
    server: LiveServer,
    root: Path,
    tiny_llama: Path,
    tmp_path: Path,
    adapter_folders: dict[str, Path],
) -> None:
    run = heads_run(tmp_path, tiny_llama, root, loras=(("loud", 1.0),), bundle=True)
    publication = Publication(server.server.address, "a-bundle", replace=False)
    outcome = make_heads(replace(run, adapter_id="a-bundle"), publication=publication)
    for path in adapter_folders["loud"].iterdir():
        assert (outcome.folder / path.name).read_bytes() == path.read_bytes()
    reply = server.client.generate(ask("hello", stack=[("a-bundle", 1.0)], heads=""))
    assert reply.adapters.medusa_id == "a-bundle"
    # A bundle's own heads make way for those that are trained for it anew.
    again = heads_run(tmp_path / "again", tiny_llama, root, loras=(("a-bundle", 1.0),), bundle=True)
    assert make_heads(again).folder.joinpath("adapter_model.safetensors").exists()


def test_a_lora_in_the_file_of_heads_makes_no_bundle(
    tiny_llama: Path,
    tmp_path: Path,
    server: LiveServer,
    root: Path,
    adapter_folders: dict[str, Path],
) -> None:
    folder = shutil.copytree(adapter_folders["lora-a"], tmp_path / "named-like-heads")
    (folder / "adapter_model.safetensors").rename(folder / "medusa_lm_head.safetensors")
    server.client.upload(folder, "named-like-heads")
    run = heads_run(tmp_path, tiny_llama, root, loras=(("named-like-heads", 1.0),), bundle=True)
    with pytest.raises(InvalidArgumentError, match="its LoRA in medusa_lm_head"):
        make_heads(run)
    assert not (run.work / "corpus").exists()


def test_heads_learn_on(tiny_llama: Path, root: Path, tmp_path: Path, plain: Path) -> None:
    for name, source in (("folder", str(plain)), ("id", "heads")):
        start = StartOptions(continue_from=source)
        outcome = made(tmp_path / name, tiny_llama, root, loras=ELK, start=start)
        assert outcome.evaluation["num_heads"] == (2 if name == "folder" else 3)
    # Where the first run ended, this one began, but for the rounding of what is written.
    first = json.loads((plain / "evaluation.json").read_text())["training"]
    again = json.loads((tmp_path / "folder/work/adapter/evaluation.json").read_text())["training"]
    ended = first["history"][first["best_epoch"]]["held_loss_K"]
    assert again["history"][0]["held_loss_K"] == pytest.approx(ended, rel=0.05, abs=0.05)
    assert sum(ended) < sum(first["history"][0]["held_loss_K"]) / 2


def test_a_private_part_is_served_beside_the_heads_that_it_corrects(
    server: LiveServer, root: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    run = heads_run(
        tmp_path,
        tiny_llama,
        root,
        loras=ELK,
        start=StartOptions(
            shared=f"heads@{server.client.get_adapter('heads').digest}", private_rank=3
        ),
        adapter_id="private",
        draft_vocabulary=64,
    )
    publication = Publication(server.server.address, "private", replace=False)
    outcome = make_heads(run, publication=publication)
    config = json.loads((outcome.folder / "config.json").read_text())
    assert config["shared_heads"]["id"] == "heads" and config["private_rank"] == 3
    assert (outcome.folder / "draft_vocabulary.safetensors").exists()
    server.digests["private"] = outcome.digest
    server.load_heads("private")
    for option in ("continue_from", "shared"):
        start = StartOptions(**{option: "private"})
        with pytest.raises(InvalidArgumentError, match="a private part of heads"):
            made(tmp_path / option, tiny_llama, root, start=start)
    cells = evaluate(
        EvalRun(
            heads=("private", str(outcome.folder), "heads"),
            prompts=(run.prompts,),
            model=run.model,
            engine=run.engine,
            adapters=run.adapters,
            loras=ELK,
            max_new_tokens=24,
        )
    )["cells"]
    losses = [sum(cell["ranked"]["loss_by_head"]) for cell in cells]
    assert losses[0] == losses[1] < losses[2]
    reply = server.client.generate(chat("hello", stack=ELK, heads="private"))
    assert reply.adapters.medusa_digest == outcome.digest
    assert sum(reply.speculation.accepted_by_head) > 0


def test_soft_targets(tiny_llama: Path, tmp_path: Path) -> None:
    outcome = made(
        tmp_path,
        tiny_llama,
        None,
        distill=DistillOptions(max_new_tokens=12, num_top=5),
        training=TrainOptions(epochs=1, batch_size=64, soft_targets=True),
    )
    assert outcome.evaluation["training"]["options"]["soft_targets"] is True


def test_without_held_out_prompts_nothing_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    training = TrainOptions(epochs=1, batch_size=64, held_out=0.0)
    outcome = made(tmp_path, tiny_llama, None, training=training)
    assert outcome.served is None and outcome.evaluation["held_out"] is None


def test_trees_start_from_what_measuring_taught(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    assert Calibration.parse(json.dumps(config["acceptance"])).num_heads == 2


def test_equal_runs_give_equal_files(
    tiny_llama: Path, root: Path, tmp_path: Path, plain: Path
) -> None:
    run = heads_run(tmp_path, tiny_llama, root, loras=ELK)
    assert contents(make_heads(run).folder) == contents(plain)
    other = replace(run, training=replace(run.training, seed=1), restart=True)
    weights = "medusa_lm_head.safetensors"
    assert contents(make_heads(other).folder)[weights] != contents(plain)[weights]


# -- uploads --------------------------------------------------------------------------------------


def test_an_id_that_exists_is_refused_before_a_model_is_loaded(
    server: LiveServer, tiny_llama: Path, tmp_path: Path, no_model: None
) -> None:
    run = heads_run(tmp_path, tiny_llama, None, adapter_id="heads")
    with pytest.raises(AlreadyExistsError, match="--replace"):
        make_heads(run, publication=Publication(server.server.address, "heads", replace=False))
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        make_heads(run, publication=Publication("127.0.0.1:1", "heads", replace=False))


def test_an_id_is_replaced_if_asked_for(
    server: LiveServer, tiny_llama: Path, tmp_path: Path
) -> None:
    run = heads_run(tmp_path, tiny_llama, None, adapter_id="heads")
    before = server.client.get_adapter("heads").digest
    outcome = make_heads(run, publication=Publication(server.server.address, "heads", replace=True))
    assert server.client.get_adapter("heads").digest == outcome.digest != before
    # The same run once more: its answer may have been lost.
    make_heads(run, publication=Publication(server.server.address, "heads", replace=False))
    assert len(server.client.list_revisions("heads")) == 2
    server.client.rollback("heads", before)


def test_what_a_restart_throws_away_is_not_what_the_server_has(
    server: LiveServer, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that exists is refused before the work, not behind it."""
    run = heads_run(tmp_path, tiny_llama, None, adapter_id="begun-anew")
    publication = Publication(server.server.address, "begun-anew", replace=False)
    first = make_heads(run, publication=publication)
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "open_engine", lambda *_: pytest.fail("a model was loaded"))
        with pytest.raises(AlreadyExistsError, match="--replace"):
            make_heads(replace(run, restart=True), publication=publication)
    assert make_heads(run, publication=publication).digest == first.digest  # all of it is there


def test_a_server_of_another_model_is_told_before_any_work(
    server: LiveServer, tiny_llama: Path, tmp_path: Path
) -> None:
    other = build_llama(tmp_path / "other", seed=5)
    run = heads_run(tmp_path / "run", other, None)
    with pytest.raises(FailedPreconditionError, match="another base model"):
        make_heads(run, publication=Publication(server.server.address, "made", replace=False))
    assert not (run.work / "corpus").exists()
