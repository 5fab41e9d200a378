"""The card, evaluation.json and the plot tell what was trained and measured."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from lorastack.train.folder import json_bytes
from lorastack.train.heads import identity_heads, with_private
from lorastack.train.measure import Summary, measure_heads, summary
from lorastack.train.options import Trained, TrainOptions
from lorastack.train.report import Origin, card, evaluation, plot
from lorastack.train.trainer import train_heads
from lorastack.train.vocabulary import output_of
from tests.train.corpora import HIDDEN, counting_corpus, lm_head

ORIGIN = Origin(
    name="heads-mine",
    base_model="some/base",
    command=["lorastack", "train", "heads", "--prompts", "my prompts.jsonl"],
    data={"prompts": "my prompts.jsonl", "sampling": {"temperature": 0.0, "seed": 7}},
    loras=["lora-mine"],
    vocabulary_size=4096,
    coverage=0.98765432,
)
OPTIONS = TrainOptions(epochs=2, batch_size=64, held_out=0.2, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Summary]:
    corpus = counting_corpus(tmp_path_factory.mktemp("corpus"))
    start = identity_heads(2, 1, HIDDEN)
    trained = train_heads(start, corpus, lm_head(), None, OPTIONS, dtype=torch.float32)
    output = output_of(lm_head(), None, device=torch.device("cpu"), dtype=torch.float32)
    measured = measure_heads(trained.heads, corpus, torch.arange(60), output)
    return trained, summary(measured, [0, 30, 60])


def test_evaluation_is_plain_json(made: tuple[Trained, Summary]) -> None:
    trained, held_out = made
    facts = json.loads(json_bytes(evaluation(ORIGIN, OPTIONS, trained, held_out)))
    assert facts["draft_vocabulary"] == {"size": 4096, "coverage": 0.9877}
    assert facts["data"] == dict(ORIGIN.data)
    assert facts["training"]["options"]["seed"] == 3
    assert facts["training"]["command"].endswith("--prompts 'my prompts.jsonl'")
    assert [epoch["number"] for epoch in facts["training"]["history"]] == [0, 1, 2]
    assert [len(row) for row in facts["held_out"]["top_1_to_10_by_head"]] == [10, 10]
    assert facts["held_out"]["tokens_a_step"]["chain_by_length"]["2"] == round(held_out.chain[2], 4)
    assert json.loads(json_bytes(evaluation(ORIGIN, OPTIONS, trained, None)))["held_out"] is None


def test_nothing_counted_is_null(made: tuple[Trained, Summary]) -> None:
    trained, held_out = made
    nothing = Summary(
        num_samples=0,
        num_positions=0,
        loss_K=[float("nan")] * 2,
        top_KR=held_out.top_KR,
        chain={1: 1.0},
        trees={},
        choices=[],
    )
    facts = json.loads(json_bytes(evaluation(ORIGIN, OPTIONS, trained, nothing)))
    assert facts["held_out"]["loss_by_head"] == [None, None]


def test_the_card_says_how_to_make_them_again(made: tuple[Trained, Summary]) -> None:
    trained, held_out = made
    text = card(ORIGIN, OPTIONS, trained, held_out)
    assert text.startswith("---\nbase_model: some/base\n---\n")
    assert "heads-mine: Medusa heads for some/base with lora-mine" in text
    assert "    lorastack train heads --prompts 'my prompts.jsonl'\n" in text
    assert "seed 3" in text and '"seed": 7' in text and "98.8%" in text
    assert f"| top-1 | {held_out.top_KR[0][0]:.3f} | {held_out.top_KR[1][0]:.3f} |" in text
    assert f"| tree of 8 nodes | {held_out.trees[8]:.3f} |" in text
    assert "No prompts were held out." in card(ORIGIN, OPTIONS, trained, None)


def test_the_card_of_a_private_part_names_its_shared_heads(made: tuple[Trained, Summary]) -> None:
    trained, held_out = made
    private = Trained(
        heads=with_private(trained.heads, 4, 0),
        history=trained.history,
        best=trained.best,
        num_positions=trained.num_positions,
        seconds=0.0,
    )
    origin = Origin(
        name="private-mine",
        base_model="some/base",
        command=["lorastack"],
        data={},
        shared="heads-general",
        vocabulary_size=4096,
        own_vocabulary=False,
        coverage=0.84,
    )
    text = card(origin, OPTIONS, private, held_out)
    assert "rank 4" in text and "2 heads of heads-general" in text
    assert "heads-general names the 4,096 tokens that they choose from: 84.0% of" in text
    own = card(replace(origin, own_vocabulary=True), OPTIONS, private, held_out)
    assert "`draft_vocabulary.safetensors` names the 4,096 tokens" in own
    assert evaluation(origin, OPTIONS, private, held_out)["private_rank"] == 4


def test_without_matplotlib_there_is_no_plot(
    made: tuple[Trained, Summary],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot(*made) is None
    assert "pip install 'lorastack[train]'" in caplog.text


@pytest.mark.parametrize("held", [True, False])
def test_the_plot_is_a_png(made: tuple[Trained, Summary], held: bool) -> None:
    pytest.importorskip("matplotlib")
    data = plot(made[0], made[1] if held else None)
    assert data is not None and data.startswith(b"\x89PNG\r\n")
