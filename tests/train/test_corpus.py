"""What is written is read, in the order of the prompts; a kill or a full disk costs one sample."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from lorastack.errors import FailedPreconditionError, ResourceExhaustedError
from lorastack.train.corpus import NO_TARGET, Corpus, CorpusWriter, Sample

HIDDEN = 6
SETTINGS = {"model": "tiny", "seed": 3}
FILES = (
    "prompts.bin",
    "answers.bin",
    "hidden.bin",
    "top_ids.bin",
    "top_logprobs.bin",
    "samples.bin",
)


def sample(number: int, length: int, *, key: int | None = None) -> Sample:
    generator = torch.Generator().manual_seed(number)
    return Sample(
        number=number,
        prompt_key=number * 2**60 if key is None else key,
        prompt_ids=[number, 100 + number],
        answer_ids=[1000 * number + i for i in range(length)],
        hidden_TH=torch.randn(length, HIDDEN, generator=generator).bfloat16(),
        top_ids_TN=torch.randint(9, (length, 2), generator=generator),
        top_logprobs_TN=torch.randn(length, 2, generator=generator),
    )


SAMPLES = [sample(4, 3), sample(0, 2), sample(7, 1), sample(2, 5)]


def writer(folder: Path, **options: Any) -> CorpusWriter:
    form = {"settings": SETTINGS, "hidden_size": HIDDEN, "dtype": torch.bfloat16, "num_top": 2}
    return CorpusWriter(folder, **(form | options))


def write(folder: Path, samples: list[Sample]) -> Path:
    with writer(folder) as each:
        for one in samples:
            each.append(one)
    return folder


def check(corpus: Corpus, samples: list[Sample]) -> None:
    """Everything that a corpus says, against these samples in the order of their numbers."""
    samples = sorted(samples, key=lambda each: each.number)
    assert corpus.num_samples == len(samples)
    assert corpus.num_tokens == sum(len(each.answer_ids) for each in samples)
    for i, each in enumerate(samples):
        positions_P = corpus.positions([i])
        assert positions_P.tolist() == list(range(corpus.starts[i], corpus.starts[i + 1]))
        assert corpus.number(i) == each.number
        assert corpus.prompt_key(i) == each.prompt_key
        assert corpus.prompt(i).tolist() == each.prompt_ids
        assert corpus.answers(i).tolist() == each.answer_ids
        assert torch.equal(corpus.hidden(positions_P), each.hidden_TH)
        ids_PN, logprobs_PN = corpus.top(positions_P)
        assert torch.equal(ids_PN, each.top_ids_TN)
        assert torch.equal(logprobs_PN, each.top_logprobs_TN)


def test_samples_are_read_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path / "c", SAMPLES))
    check(corpus, SAMPLES)
    assert corpus.settings == SETTINGS
    assert (corpus.hidden_size, corpus.dtype, corpus.num_top) == (HIDDEN, torch.bfloat16, 2)
    mixed_P = torch.tensor([9, 0, 4, 4])
    assert corpus.tokens(mixed_P).tolist() == [4002, 0, 2002, 2002]
    assert torch.equal(corpus.hidden(mixed_P)[1:2], corpus.hidden(torch.tensor([0])))


def test_order_and_interruptions_do_not_show(tmp_path: Path) -> None:
    one = Corpus.open(write(tmp_path / "one", SAMPLES))
    write(tmp_path / "two", SAMPLES[2:])
    other = Corpus.open(write(tmp_path / "two", SAMPLES[:2]))
    everything_P = one.positions(range(4))
    assert torch.equal(one.starts, other.starts)
    assert torch.equal(one.hidden(everything_P), other.hidden(everything_P))
    assert torch.equal(one.tokens(everything_P), other.tokens(everything_P))


def test_head_k_learns_what_came_k_tokens_later(tmp_path: Path) -> None:
    corpus = Corpus.open(write(tmp_path / "c", [sample(1, 3), sample(2, 1), sample(3, 2)]))
    assert corpus.targets(torch.tensor([0, 1, 2, 3, 4, 5]), 2).tolist() == [
        [1001, 1002],
        [1002, NO_TARGET],
        [NO_TARGET, NO_TARGET],
        [NO_TARGET, NO_TARGET],
        [3001, NO_TARGET],
        [NO_TARGET, NO_TARGET],
    ]
    assert corpus.targets(torch.tensor([4]), 1).tolist() == [[3001]]


def test_samples_of_one_prompt_are_on_one_side(tmp_path: Path) -> None:
    keys = [(5 * i % 7) * 2**61 for i in range(21)]
    samples = [sample(i, 1, key=key) for i, key in enumerate(keys)]
    corpus = Corpus.open(write(tmp_path / "c", samples))
    train, held = corpus.split(0.25)
    assert sorted(train + held) == list(range(21))
    assert {keys[i] for i in held} == {0, 2**61}
    assert corpus.split(0.0) == (list(range(21)), [])
    for share in (1e-9, 1.0):  # neither side is empty
        train, held = corpus.split(share)
        assert train and held
    shorter = Corpus.open(write(tmp_path / "shorter", samples[:9]))
    _, held_before = shorter.split(0.25)
    assert [i for i in corpus.split(0.25)[1] if i < 9] == held_before


@pytest.mark.parametrize("name", FILES)
def test_a_torn_sample_is_cut_off(tmp_path: Path, name: str) -> None:
    """Whatever a kill left of the last sample, in whichever file."""
    for lost in range(1, 5):
        folder = write(tmp_path / str(lost), SAMPLES)
        path = folder / name
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - lost)
        check(Corpus.open(folder), SAMPLES[:-1])
        with writer(folder) as each:
            assert each.numbers == {4, 0, 7}
            assert each.num_tokens == 6
            each.append(SAMPLES[-1])
        check(Corpus.open(folder), SAMPLES)


@pytest.mark.parametrize("name", FILES[:-1])
def test_bytes_without_a_record_do_not_count(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "c", SAMPLES[:2])
    with (folder / name).open("ab") as file:
        file.write(b"torn")
    check(Corpus.open(folder), SAMPLES[:2])
    check(Corpus.open(write(folder, SAMPLES[2:])), SAMPLES)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_sample_and_those_behind_it_are_cut_off(tmp_path: Path, name: str) -> None:
    """As a machine that loses power may leave them: of the right length, with other bytes."""
    folder = write(tmp_path / "c", SAMPLES)
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2 - 1] ^= 1
    path.write_bytes(data)
    with writer(folder) as each:
        kept = each.num_samples
        assert kept < len(SAMPLES)
    if kept:
        check(Corpus.open(folder), SAMPLES[:kept])
    check(Corpus.open(write(folder, SAMPLES[kept:])), SAMPLES)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", SAMPLES[:1])
    with pytest.raises(FailedPreconditionError, match="seed 3, not 4"):
        writer(folder, settings={**SETTINGS, "seed": 4})
    with pytest.raises(FailedPreconditionError, match="num_top 2, not 0"):
        writer(folder, num_top=0)
    check(Corpus.open(folder), SAMPLES[:1])


def test_one_process_writes(tmp_path: Path) -> None:
    with writer(tmp_path / "c"), pytest.raises(FailedPreconditionError, match="another process"):
        writer(tmp_path / "c")
    write(tmp_path / "c", SAMPLES[:1])


def test_a_full_disk_costs_the_sample_at_hand(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writer(folder) as each:
        each.append(SAMPLES[0])
        # The file of states may not grow by more than a part of the next sample.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * HIDDEN * 2 + 5, before[1]))
        try:
            with pytest.raises(ResourceExhaustedError, match="1 samples there stay"):
                each.append(SAMPLES[3])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        check(Corpus.open(folder), SAMPLES[:1])
        each.append(SAMPLES[3])  # there is room again
    check(Corpus.open(folder), [SAMPLES[0], SAMPLES[3]])


def test_what_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="no corpus"):
        Corpus.open(tmp_path)
    with writer(tmp_path / "c"), pytest.raises(FailedPreconditionError, match="no samples yet"):
        Corpus.open(tmp_path / "c")
    for text in ("{}", '{"format": "lorastack corpus 1", "settings": {}}'):
        (tmp_path / "c" / "corpus.json").write_text(text)
        with pytest.raises(FailedPreconditionError, match="no corpus"):
            writer(tmp_path / "c")


def test_without_top_lists(tmp_path: Path) -> None:
    with writer(tmp_path / "c", num_top=0, dtype=torch.float32) as each:
        plain = Sample(
            number=0,
            prompt_key=1,
            prompt_ids=[1],
            answer_ids=[2],
            hidden_TH=torch.ones(1, HIDDEN),
        )
        each.append(plain)
    corpus = Corpus.open(tmp_path / "c")
    assert corpus.hidden(torch.tensor([0])).dtype == torch.float32
    assert not (tmp_path / "c" / "top_ids.bin").exists()
