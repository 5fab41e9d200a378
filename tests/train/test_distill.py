"""The same prompts give the same corpus: whatever runs beside a row, drafts, kills, full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorastack.config import EngineConfig
from lorastack.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from lorastack.request import SamplingParams
from lorastack.train.corpus import Corpus
from lorastack.train.distill import DistillOptions, Progress, distill, own_seed
from lorastack.train.local import LocalEngine
from lorastack.train.prompts import PromptFile
from tests.helpers.reference import Reference
from tests.train.conftest import FAMILIAR, ROOMY, TIGHT, OpenTiny

GREEDY = DistillOptions(max_new_tokens=24)
SAMPLED = DistillOptions(max_new_tokens=24, sampling=SamplingParams(temperature=0.9, seed=7))
LINES: list[dict[str, Any]] = [
    *({"prompt": text} for text in FAMILIAR),
    {"conversations": [
        {"from": "human", "value": "hello"},
        {"from": "gpt", "value": "there"},
        {"from": "human", "value": "and then?"},
        {"from": "gpt", "value": "never read"},
    ]},
    {"prompt": "hello there"},
    {"instruction": "Sort", "input": "3 1 2"},
    {"prompt": "The quick brown fox jumps over the lazy dog. " * 3},
    {"prompt": "a"},
    {"prompt": "the sun"},
]  # fmt: skip


def write(path: Path, lines: Sequence[dict[str, Any]] = LINES) -> PromptFile:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PromptFile(path)


@pytest.fixture
def prompts(tmp_path: Path) -> PromptFile:
    return write(tmp_path / "prompts.jsonl")


def run(
    engine: LocalEngine,
    prompts: PromptFile,
    folder: Path,
    options: DistillOptions = GREEDY,
    loras: Sequence[tuple[str, float]] = (),
    **more: Any,
) -> Corpus:
    distill(engine, prompts, engine.select(loras, "heads"), folder, options, **more)
    return Corpus.open(folder)


def assert_same(one: Corpus, other: Corpus, *, to_the_bit: bool = True) -> None:
    assert one.num_samples == other.num_samples
    assert torch.equal(one.starts, other.starts)
    everything_P = one.positions(range(one.num_samples))
    assert torch.equal(one.tokens(everything_P), other.tokens(everything_P))
    assert [one.prompt_key(i) for i in range(one.num_samples)] == [
        other.prompt_key(i) for i in range(one.num_samples)
    ]
    tolerance = 0.0 if to_the_bit else 2e-5
    torch.testing.assert_close(
        one.hidden(everything_P), other.hidden(everything_P), atol=tolerance, rtol=tolerance
    )


def test_answers_and_states_are_the_models_own(
    open_tiny: OpenTiny,
    tmp_path: Path,
    prompts: PromptFile,
    tiny_llama: Path,
    adapter_folders: dict[str, Path],
) -> None:
    """With a LoRA: data comes from the adapted model."""
    stack = [("lora-a", 0.7)]
    reference = Reference(tiny_llama, {"lora-a": adapter_folders["lora-a"]})
    with open_tiny() as engine:
        eos_ids = engine.model.tokenizer.eos_ids
        corpus = run(engine, prompts, tmp_path / "c", loras=stack)
        chats = [engine.model.tokenizer.chat(prompt.messages) for prompt in prompts]
    assert corpus.num_samples == len(LINES)
    for i, ids in enumerate(chats):
        assert corpus.prompt(i).tolist() == ids
        answer = corpus.answers(i).tolist()
        assert tuple(answer) == reference.generate(ids, 24, stack=stack, eos_ids=eos_ids).tokens
        states_TH = reference.states([*ids, *answer], stack)[len(ids) - 1 : -1]
        torch.testing.assert_close(
            corpus.hidden(corpus.positions([i])), states_TH, atol=2e-5, rtol=2e-5
        )
    assert corpus.prompt_key(0) == corpus.prompt_key(4) != corpus.prompt_key(1)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batches_and_drafts_do_not_show(
    open_tiny: OpenTiny, tmp_path: Path, prompts: PromptFile, options: DistillOptions
) -> None:
    with open_tiny(TIGHT, backend="native") as engine:
        together = run(engine, prompts, tmp_path / "together", options)
    with open_tiny(EngineConfig(kv_memory=ROOMY.kv_memory, max_rows=1), backend="native") as engine:
        plain = DistillOptions(
            max_new_tokens=options.max_new_tokens, sampling=options.sampling, drafts=False
        )
        alone = run(engine, prompts, tmp_path / "alone", plain)
    assert_same(together, alone)


def test_each_prompt_is_sampled_by_its_own_seed(
    open_tiny: OpenTiny, tmp_path: Path, prompts: PromptFile
) -> None:
    other_seed = DistillOptions(max_new_tokens=24, sampling=SamplingParams(temperature=0.9, seed=8))
    with open_tiny() as engine:
        corpus = run(engine, prompts, tmp_path / "one", SAMPLED)
        other = run(engine, prompts, tmp_path / "other", other_seed)
    assert corpus.prompt_key(0) == corpus.prompt_key(4)
    assert corpus.answers(0).tolist() != corpus.answers(4).tolist()
    assert corpus.answers(0).tolist() != other.answers(0).tolist()
    assert len({own_seed(seed, number) for seed in range(9) for number in range(9)}) == 81
    assert corpus.settings["sampling"]["seed"] == 7


def test_the_base_s_best_tokens(open_tiny: OpenTiny, tmp_path: Path, prompts: PromptFile) -> None:
    options = DistillOptions(max_new_tokens=8, num_top=5)
    with open_tiny() as engine:
        corpus = run(engine, prompts, tmp_path / "c", options)
        lm_head_VH = engine.model.files.base_weight("lm_head.weight")
    everything_P = corpus.positions(range(corpus.num_samples))
    ids_PN, logprobs_PN = corpus.top(everything_P)
    assert ids_PN.shape == logprobs_PN.shape == (corpus.num_tokens, 5)
    assert torch.equal(ids_PN[:, 0], corpus.tokens(everything_P))
    wanted_PV = torch.log_softmax(corpus.hidden(everything_P) @ lm_head_VH.T, -1)
    torch.testing.assert_close(logprobs_PN, wanted_PV.gather(1, ids_PN), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_skipped_and_counted(
    open_tiny: OpenTiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"prompt": "x" * 90}
    prompts = write(tmp_path / "p.jsonl", [LINES[0], long, LINES[7], long])
    seen: list[Progress] = []
    with open_tiny(max_context=64) as engine:
        corpus = run(engine, prompts, tmp_path / "c", progress=seen.append)
        assert [corpus.number(i) for i in range(corpus.num_samples)] == [0, 2]
        assert "line 2" in caplog.text and "line 4" in caplog.text
        last = distill(engine, prompts, engine.select((), "heads"), tmp_path / "c", GREEDY)
        assert (last.num_samples, last.num_skipped, last.num_prompts) == (2, 2, 4)
        with pytest.raises(InvalidArgumentError, match=r"none of its 1 prompts .* 64 tokens"):
            run(engine, write(tmp_path / "long.jsonl", [long]), tmp_path / "none")
        # Answers end with the context.
        nearly = write(tmp_path / "nearly.jsonl", [{"prompt": "x" * 30}])
        corpus = run(engine, nearly, tmp_path / "nearly", DistillOptions(max_new_tokens=500))
        assert len(corpus.prompt(0)) + corpus.num_tokens <= 64
    assert [progress.num_samples for progress in seen] == [1, 2]
    assert seen[-1].tokens_per_second > 0


def test_a_run_goes_on_where_it_was(
    open_tiny: OpenTiny, tmp_path: Path, prompts: PromptFile
) -> None:
    class StopError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.num_samples >= 4:
            raise StopError

    with open_tiny(backend="native") as engine:
        whole = run(engine, prompts, tmp_path / "whole", SAMPLED)
        with pytest.raises(StopError):
            run(engine, prompts, tmp_path / "parts", SAMPLED, progress=stop)
        assert Corpus.open(tmp_path / "parts").num_samples == 4
        seen: list[Progress] = []
        parts = run(engine, prompts, tmp_path / "parts", SAMPLED, progress=seen.append)
        assert [progress.num_samples for progress in seen] == [5, 6, 7, 8, 9]
        assert_same(whole, parts)
        for options, name in (
            (GREEDY, "sampling"),
            (DistillOptions(max_new_tokens=9, sampling=SAMPLED.sampling), "max_new_tokens"),
        ):
            with pytest.raises(FailedPreconditionError, match=name):
                run(engine, prompts, tmp_path / "parts", options)
        with pytest.raises(FailedPreconditionError, match="loras"):
            run(engine, prompts, tmp_path / "parts", SAMPLED, loras=[("lora-a", 1.0)])
        fewer = write(tmp_path / "fewer.jsonl", LINES[:3])
        with pytest.raises(FailedPreconditionError, match="prompts_sha256"):
            run(engine, fewer, tmp_path / "parts", SAMPLED)


def test_a_full_disk_ends_it_and_room_goes_on(
    open_tiny: OpenTiny, tmp_path: Path, prompts: PromptFile
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_tiny(backend="native") as engine:
        whole = run(engine, prompts, tmp_path / "whole")
        size = (tmp_path / "whole" / "hidden.bin").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
        try:
            with pytest.raises(ResourceExhaustedError, match=r"disk of .* is full"):
                run(engine, prompts, tmp_path / "c")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert 0 < Corpus.open(tmp_path / "c").num_samples < len(LINES)
        assert_same(whole, run(engine, prompts, tmp_path / "c"))


SCRIPT = """
import sys
from pathlib import Path
from lorastack.config import EngineConfig, ModelConfig
from lorastack.train.distill import DistillOptions, distill
from lorastack.train.local import Selection, open_engine
from lorastack.train.prompts import PromptFile

model, prompts, folder = sys.argv[1:]
config = ModelConfig(model=model, device="cpu", dtype="float32", threads=1, backend="native")
with open_engine(config, EngineConfig(kv_memory=16 << 20, max_rows=4)) as engine:
    options = DistillOptions(max_new_tokens=24)
    distill(engine, PromptFile(Path(prompts)), Selection(), Path(folder), options,
            lambda progress: print(progress.num_samples, flush=True))
"""


def test_a_kill_costs_nothing_that_was_written(
    open_tiny: OpenTiny, tmp_path: Path, tiny_llama: Path
) -> None:
    lines = [{"prompt": f"{number} and {line}"} for number in range(30) for line in FAMILIAR]
    prompts = write(tmp_path / "p.jsonl", lines)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_llama), str(prompts.path), str(tmp_path / "c")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        told = 0
        while told < 5:
            line = process.stdout.readline()
            assert line, "it ended by itself"
            told = int(line)
        process.send_signal(signal.SIGKILL)
        told = max([told, *map(int, process.stdout.read().split())])
    found = Corpus.open(tmp_path / "c").num_samples
    assert told <= found
    with open_tiny(backend="native") as engine:
        seen: list[Progress] = []
        corpus = run(engine, prompts, tmp_path / "c", progress=seen.append)
        assert len(seen) == len(lines) - found
        assert_same(run(engine, prompts, tmp_path / "whole"), corpus)
