"""The test tools themselves: a canary that does not sing would let every isolation test pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorastack.kernels.native.isa import Isa
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from tests.helpers import isas
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.canary import (
    next_state,
    train_layer_canary,
    write_canary,
    write_canary_heads,
)
from tests.helpers.reference import TIE, TIE_EVERY, Reference, assert_greedy
from tests.helpers.tiny import VOCAB_SIZE, build_llama, token_id

PROMPTS = ("hello", "x", "The quick brown fox, café", "owl owl owl")


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_mistral"])
def model(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def shapes(model: Path) -> ModelShapes:
    from tests.helpers.tiny import shapes_of

    return shapes_of(model)


def encode(model: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    return ids


def test_tokenizer_round_trips_any_text(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == VOCAB_SIZE
    for text in (*PROMPTS, "naïve 日本語 🦉\n\ttabs"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("a")["input_ids"] == [0, token_id("a")]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_models_are_deterministic(tiny_llama: Path, tmp_path: Path) -> None:
    again = build_llama(tmp_path / "again")
    first = (tiny_llama / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == first


def test_base_output_is_not_degenerate(model: Path) -> None:
    reference = Reference(model, {})
    outputs = [reference.generate(encode(model, text), 24).tokens for text in PROMPTS]
    assert len(set(outputs)) == len(outputs)
    assert all(len(set(output)) > 4 for output in outputs)


@pytest.mark.parametrize("word", ["owl", "fjord"])
def test_canary_says_its_word_after_any_prompt(
    model: Path, shapes: ModelShapes, tmp_path: Path, word: str
) -> None:
    reference = Reference(model, {"canary": write_canary(tmp_path, model, shapes, word)})
    for text in (*PROMPTS, word[:2]):
        tokens = reference.generate(encode(model, text), 3 * len(word), stack=[("canary", 1.0)])
        said = AutoTokenizer.from_pretrained(model).decode(tokens.tokens)
        assert said in word * 5
        assert min(tokens.gaps) > 10


def test_layer_canary_learns_its_word(model: Path, tmp_path: Path) -> None:
    word = "fjord"
    reference = Reference(model, {"canary": train_layer_canary(tmp_path, model, word)})
    for text in (*PROMPTS, word[:2]):
        tokens = reference.generate(encode(model, text), 3 * len(word), stack=[("canary", 1.0)])
        assert AutoTokenizer.from_pretrained(model).decode(tokens.tokens) in word * 5
        assert min(tokens.gaps) > 0.5


def test_canary_heads_guess_right(model: Path, shapes: ModelShapes, tmp_path: Path) -> None:
    """Checked by the formula of Medusa v2 on transformers' own hidden states."""
    word, num_heads = "fjord", 4
    adapter = write_canary(tmp_path / "lora", model, shapes, word)
    heads = write_canary_heads(tmp_path / "heads", model, shapes, word, num_heads=num_heads)
    weights = load_file(heads / "medusa_lm_head.safetensors")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    llama = peft.base_model.model
    for state, text in enumerate(["?", *word]):
        ids = torch.tensor([encode(model, "ab" + text)])
        with torch.inference_mode():
            x = llama.model(ids).last_hidden_state[0, -1]
            for head in range(1, num_heads + 1):
                z = weights[f"{head - 1}.0.linear.weight"] @ x
                z = z + weights[f"{head - 1}.0.linear.bias"]
                guess = int(llama.lm_head(x + torch.nn.functional.silu(z)).argmax())
                target = state
                for _ in range(head + 1):
                    target = next_state(target, len(word))
                assert guess == token_id(word[target - 1])


def test_random_loras_change_the_output(model: Path, shapes: ModelShapes, tmp_path: Path) -> None:
    targets = (*LAYER_TARGETS, EMBED, LM_HEAD)
    loras = {
        "a": write_lora(tmp_path / "a", shapes, seed=1, rank=8),
        "b": write_lora(tmp_path / "b", shapes, seed=2, rank=3, alpha=5.0, targets=targets),
        "c": write_lora(tmp_path / "c", shapes, seed=3, targets=("q_proj",), layers=[1]),
    }
    reference = Reference(model, loras)
    prompt = encode(model, "hello there")
    stacks = [[], [("a", 1.0)], [("b", 1.0)], [("a", 1.0), ("b", 0.5)]]
    outputs = {reference.generate(prompt, 16, stack=stack).tokens for stack in stacks}
    assert len(outputs) == len(stacks)
    base, partial = reference.logits(prompt), reference.logits(prompt, [("c", 1.0)])
    assert (base - partial).abs().max() > 1e-3


def test_stack_is_the_sum_of_deltas(model: Path, shapes: ModelShapes, tmp_path: Path) -> None:
    """Against PEFT's weighted concatenation, in an order that it gets right."""
    loras = {
        "a": write_lora(tmp_path / "a", shapes, seed=1, rank=8),
        "b": write_lora(tmp_path / "b", shapes, seed=2, rank=3, alpha=5.0, use_rslora=True),
    }
    reference = Reference(model, loras)
    prompt = encode(model, "hello there")
    stacked = reference.logits(prompt, [("b", -0.5), ("a", 1.5)])
    alone = reference.logits(prompt, [("a", 1.0)])
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), loras["a"], "a")
    peft.load_adapter(loras["b"], "b")
    with torch.inference_mode():
        peft.set_adapter("a")
        torch.testing.assert_close(peft(torch.tensor([prompt])).logits[0], alone)
        peft.add_weighted_adapter(["a", "b"], [1.5, -0.5], "both", combination_type="cat")
        peft.set_adapter("both")
        cat = peft(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(stacked, cat, atol=1e-4, rtol=1e-4)


def test_heads_folder_has_the_published_layout(tmp_path: Path) -> None:
    folder = write_heads(tmp_path, 64, num_heads=2)
    shapes = {
        name: tuple(t.shape) for name, t in load_file(folder / "medusa_lm_head.safetensors").items()
    }
    assert shapes == {
        "0.0.linear.weight": (64, 64),
        "0.0.linear.bias": (64,),
        "1.0.linear.weight": (64, 64),
        "1.0.linear.bias": (64,),
    }


def test_a_greedy_output_is_held_to_its_own_stack(
    tiny_llama: Path, tiny_llama_shapes: ModelShapes, tmp_path: Path
) -> None:
    """One wrong token, and one row of 20 with another row's LoRA, are seen."""
    loras = {
        name: write_lora(tmp_path / name, tiny_llama_shapes, seed=seed, rank=8)
        for seed, name in enumerate(("a", "b"))
    }
    reference = Reference(tiny_llama, loras)
    outputs = []
    for number in range(20):
        prompt, stack = encode(tiny_llama, f"row {number}"), [("ab"[number % 2], 1.0)]
        outputs.append((prompt, stack, reference.generate(prompt, 12, stack=stack).tokens))
    assert_greedy(reference, outputs)
    prompt, _, tokens = outputs[7]
    for wrong in (
        (prompt, [("a", 1.0)], tokens),
        (prompt, [("b", 0.5)], tokens),
        (prompt, [("b", 1.0)], (*tokens[:-1], tokens[-1] ^ 1)),
    ):
        with pytest.raises(AssertionError, match="below the best"):
            assert_greedy(reference, [*outputs[:7], wrong, *outputs[8:]])


def test_near_ties_are_few_and_between_the_best(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens 0 and 1 tie everywhere but for rounding; token 2 is worse."""
    reference = Reference(tiny_llama, {})
    row_V = torch.tensor([1.0, 1.0 - TIE / 2, 1.0 - 2 * TIE])
    monkeypatch.setattr(Reference, "logits", lambda _, tokens, stack: row_V.repeat(len(tokens), 1))
    many = [0] * TIE_EVERY
    for passes in ([1, 0, 0], [*many, 1, 1]):
        assert_greedy(reference, [([5, 5], (), passes)])
    for fails in ([1, 0, 1], [0, 2], [*many, 1, 1, 1], []):
        with pytest.raises(AssertionError):
            assert_greedy(reference, [([5, 5], (), fails)])
    with pytest.raises(AssertionError):
        assert_greedy(reference, [])


def test_missing_instruction_sets_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isas, "library", lambda: True)
    for here in ({Isa.AVX512, Isa.PLAIN}, set[Isa]()):
        monkeypatch.setattr(isas, "supported", here.__contains__)
        assert len(isas.each_of()) == len(here) + 1, "all that are missing are one parameter"
        assert len(isas.each_variant()) == 2 * len(here) + 1
        assert len(isas.each_variant(Isa.AMX)) == 1
        reasons = [isas.needs(*each).kwargs["reason"] for each in ((Isa.AMX,), (*Isa,))]
        skipped = {reasons[0]: 3, reasons[1]: 4, "needs a GPU": 2}
        first, second = isas.summary({Isa.AVX512: 5}, skipped)
        assert "; 7 skipped for want of AMX, AVX512_BF16" in first
        assert ("AVX512 (5 tests), PLAIN (0 tests)" in first) == bool(here)
        assert second == "2 skipped: needs a GPU"
    assert isas.summary({}, {}) == ["native kernels here: none"]


def test_tests_are_counted_by_the_instruction_sets_in_their_names() -> None:
    nodeids = ["a.py::b[AVX512-float32]", "a.py::b[llama-AVX512_BF16-bfloat16]", "a.py::PLAIN_b[1]"]
    assert isas.count_tested([*nodeids, nodeids[0]]) == {Isa.AVX512: 2, Isa.AVX512_BF16: 1}
