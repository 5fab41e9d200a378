"""Requests of one row at a time, and the lm_head that heads are served with."""

from __future__ import annotations

import pytest

from lorastack.train.evaluate import selected_lm_head
from lorastack.train.local import Reply
from lorastack.train.served import Decoding, Served, serve
from tests.train.conftest import FAMILIAR, OpenTiny


@pytest.mark.parametrize(
    "loras", [(), (("lora-a", 1.0),), (("lora-b", 0.7),), (("lora-a", 0.5), ("lora-b", -0.5))]
)
def test_the_lm_head_says_what_the_model_says(
    loras: tuple[tuple[str, float], ...], open_tiny: OpenTiny
) -> None:
    replies: list[Reply] = []
    with open_tiny() as engine:
        selection = engine.select(loras, "none")
        prompts = [engine.model.tokenizer.encode(text) for text in FAMILIAR]
        results = serve(
            engine,
            prompts,
            selection.loras,
            [],
            max_new_tokens=12,
            on_plain=lambda index, reply: replies.append(reply),
        )
        lm_head_VH, adapted = selected_lm_head(engine, selection)
    assert results == [] and len(replies) == len(prompts)
    assert adapted == any(lora_id == "lora-b" for lora_id, _ in loras)
    for reply in replies:
        assert reply.states_TH is not None
        said = (reply.states_TH.float() @ lm_head_VH.float().T).argmax(-1)
        assert said.tolist() == [token.id for token in reply.tokens]


def test_steps_of_prompts_do_not_count(open_tiny: OpenTiny) -> None:
    with open_tiny() as engine:
        heads = engine.select((), "heads").heads
        assert heads is not None
        prompts = [engine.model.tokenizer.encode(text) for text in FAMILIAR]
        done: list[int] = []
        (result,) = serve(engine, prompts, (), [heads], max_new_tokens=16, progress=done.append)
    assert done == [1, 2, 3] and result.num_prompts == 3
    assert result.off.tokens == result.off.steps == result.auto.tokens == 3 * 15
    assert result.auto.steps < result.off.steps and result.auto.num_different == 0
    assert result.learnt


def test_nothing_decoded_is_no_speed() -> None:
    empty = Served(num_prompts=1, off=Decoding(), auto=Decoding(), learnt="")
    told = empty.to_json()
    assert (told["tokens_a_step"], told["tokens_a_second"], told["speed_up"]) == (0.0, 0.0, 0.0)
    slow, fast = Decoding(tokens=10, steps=10, seconds=2.0), Decoding(tokens=10, steps=4, seconds=1)
    told = Served(num_prompts=1, off=slow, auto=fast, learnt="").to_json()
    assert (told["tokens_a_step"], told["speed_up"]) == (2.5, 2.0)
    assert told["tokens_a_second_without_drafts"] == 5.0
