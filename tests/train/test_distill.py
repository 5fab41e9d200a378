"""A model's own answers: batched generation equals generation row by row."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorastack.train.distill import (
    Sample,
    chat_ids,
    distill,
    generate_batch,
    read_samples,
    write_samples,
)

NO_END = 10**6  # an id that no model emits
PROMPTS = ([5, 9, 40], [17], [33, 34, 35, 36, 37, 8], [60, 61])


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Sequence[int], eos_id: int, limit: int) -> list[int]:
    """The plainest loop: no cache, no batch."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit and (ids[-1] != eos_id or len(ids) == len(prompt)):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_batch_equals_its_rows(model: PreTrainedModel) -> None:
    answers = generate_batch(model, PROMPTS, eos_id=NO_END, max_new_tokens=12)
    assert answers == [greedy(model, prompt, NO_END, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) > 1


def test_rows_that_end_leave_the_batch(model: PreTrainedModel) -> None:
    """A token that some rows emit early plays the end token, so the batch shrinks on the way."""
    whole = [greedy(model, prompt, NO_END, 12) for prompt in PROMPTS]
    eos_id = whole[0][2]
    answers = generate_batch(model, PROMPTS, eos_id=eos_id, max_new_tokens=12)
    assert answers == [greedy(model, prompt, eos_id, 12) for prompt in PROMPTS]
    lengths = {len(answer) for answer in answers}
    assert min(lengths) <= 3
    assert all(eos_id not in answer[:-1] for answer in answers)


def test_sampling_follows_the_seed(model: PreTrainedModel) -> None:
    def sampled(seed: int) -> list[list[int]]:
        return generate_batch(
            model, PROMPTS, eos_id=NO_END, max_new_tokens=8, temperature=2.0, seed=seed
        )

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_every_prompt_comes_back_once(model: PreTrainedModel) -> None:
    rows = [(f"tag{i}", prompt) for i, prompt in enumerate(PROMPTS)]
    samples = list(distill(model, rows, eos_id=NO_END, max_new_tokens=4, batch_size=3))
    found = {sample.tag: sample for sample in samples}
    assert len(samples) == len(PROMPTS)
    for tag, prompt in rows:
        assert found[tag].prompt_ids == prompt
        assert found[tag].answer_ids == greedy(model, prompt, NO_END, 4)


def test_samples_survive_the_file(tmp_path: Path) -> None:
    samples = [Sample([1, 2], [3], "a"), Sample([4], [5, 6])]
    path = tmp_path / "samples.jsonl"
    assert write_samples(path, samples) == 2
    assert read_samples(path) == samples


def test_chat_prompt_ends_where_the_answer_begins(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = chat_ids(tokenizer, [{"role": "user", "content": "the sun"}])
    assert tokenizer.decode(ids) == "<|im_start|>user\nthe sun<|im_end|>\n<|im_start|>assistant\n"
