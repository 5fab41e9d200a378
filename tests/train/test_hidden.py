"""Which token a head must guess where, and that cached states are the model's own."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorastack.train.distill import Sample
from lorastack.train.hidden import NO_TARGET, hidden_corpus, targets_of

SAMPLES = [Sample([5, 6, 7], [11, 12, 13, 14]), Sample([8], [21, 22]), Sample([9, 9], [31])]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


def test_head_k_guesses_k_tokens_after_the_next() -> None:
    # The position that emits 11 is the last prompt token: lm_head gives 11, head 1 gives 12.
    assert targets_of([11, 12, 13, 14], 2).tolist() == [
        [12, 13],
        [13, 14],
        [14, NO_TARGET],
        [NO_TARGET, NO_TARGET],
    ]


def test_positions_are_those_that_emit_the_answer(model: PreTrainedModel) -> None:
    """Three lengths in one batch: padding must change nothing, order must be kept."""
    corpus = hidden_corpus(model, SAMPLES, num_heads=2)
    assert corpus.starts == [0, 4, 6, 7]
    assert corpus.num_samples == 3
    for index, sample in enumerate(SAMPLES):
        ids = torch.tensor([sample.prompt_ids + sample.answer_ids])
        with torch.inference_mode():
            states_TH = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        begin = len(sample.prompt_ids) - 1
        wanted = states_TH[begin : begin + len(sample.answer_ids)]
        found = corpus.hidden_TH[corpus.starts[index] : corpus.starts[index + 1]]
        torch.testing.assert_close(found, wanted)


def test_small_batches_give_the_same(model: PreTrainedModel) -> None:
    one = hidden_corpus(model, SAMPLES, num_heads=2, batch_tokens=1)
    all_at_once = hidden_corpus(model, SAMPLES, num_heads=2)
    torch.testing.assert_close(one.hidden_TH, all_at_once.hidden_TH)
    assert torch.equal(one.targets_TK, all_at_once.targets_TK)
