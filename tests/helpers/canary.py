"""Adapters whose output says who they are: each makes a tiny model repeat its own word for ever.

Construction. A canary of a word w_1..w_n (distinct characters, one token each) tells n + 1 states
apart: state i after w_i, state 0 after anything else. State i owns a unit vector u_i; the vectors
have disjoint supports and no negative entry. The embedding LoRA adds a large c * u_i to the
embedding of w_i (and c * u_0 to all others), which drowns whatever the layers add, so the final
norm gives about y_i = sqrt(H) * g * u_i, g being the norm's weight. The lm_head LoRA reads
(u_i / g) / sqrt(H), which is 1 in state i and 0 elsewhere, and adds a large logit to the token
after state i. Heads of a canary: head k maps state i to state i + k by y_i + SiLU(W y_i), with
W y_i = M * u_(i+k), large and nowhere negative, so that SiLU is the identity on it. The rank of W
is the number of states, so a private part of heads with W = 0 can be it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from tests.helpers.adapters import (
    heads_config,
    lora_config,
    lora_tensor_names,
    private_config,
    write_heads_tensors,
    write_lora_tensors,
)
from tests.helpers.tiny import token_id

DOMINANCE = 2000.0  # c: against layer outputs of a few units
LOGIT = 300.0  # against base logits of a few units
PUSH = 2000.0  # M: against sqrt(H)


def final_norm(model: Path) -> Tensor:
    """g: the weight of the model's last norm, [H] (single-file folders only)."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return torch.as_tensor(file.get_tensor("model.norm.weight")).float()


def next_state(state: int, length: int) -> int:
    """0 -> 1 -> 2 ... -> n -> 1."""
    return state % length + 1


def _directions(num_states: int, hidden_size: int) -> Tensor:
    """[S, H] unit vectors with disjoint supports and no negative entry."""
    width = hidden_size // num_states
    assert width >= 1, "the word is too long for this hidden size"
    vectors = torch.zeros(num_states, hidden_size)
    for state in range(num_states):
        vectors[state, state * width : (state + 1) * width] = 1 / math.sqrt(width)
    return vectors


def _readers(model: Path, shapes: ModelShapes, num_states: int) -> Tensor:
    """[S, H]: row i gives 1 on the final hidden state of state i, 0 on the others."""
    scale_H = final_norm(model) * math.sqrt(shapes.hidden_size)
    return _directions(num_states, shapes.hidden_size) / scale_H


def write_canary(folder: Path, model: Path, shapes: ModelShapes, word: str) -> Path:
    """A LoRA on embed_tokens and lm_head: after any prompt the model says word, word, word..."""
    tokens = [token_id(char) for char in word]
    assert len(set(tokens)) == len(tokens), "a canary's characters must be distinct"
    num_states = len(tokens) + 1
    embed_a = torch.zeros(num_states, shapes.vocab_size)
    embed_a[0] = 1.0
    embed_a[0, tokens] = 0.0
    for state, token in enumerate(tokens, start=1):
        embed_a[state, token] = 1.0
    head_b = torch.zeros(shapes.vocab_size, num_states)
    for state in range(num_states):
        head_b[tokens[next_state(state, len(tokens)) - 1], state] = LOGIT
    embed_names, head_names = lora_tensor_names(0, EMBED), lora_tensor_names(0, LM_HEAD)
    tensors = {
        embed_names[0]: embed_a,
        embed_names[1]: DOMINANCE * _directions(num_states, shapes.hidden_size).T,
        head_names[0]: _readers(model, shapes, num_states),
        head_names[1]: head_b,
    }
    config = lora_config(num_states, num_states, (EMBED, LM_HEAD))
    return write_lora_tensors(folder, tensors, config)


def write_canary_heads(
    folder: Path, model: Path, shapes: ModelShapes, word: str, *, num_heads: int = 3
) -> Path:
    """Heads whose guesses are always right in a row that runs the canary of `word`."""
    length = len(word)
    directions = _directions(length + 1, shapes.hidden_size)
    readers = _readers(model, shapes, length + 1)
    tensors: dict[str, Tensor] = {}
    for head in range(1, num_heads + 1):
        weight = torch.zeros(shapes.hidden_size, shapes.hidden_size)
        for state in range(length + 1):
            target = state
            for _ in range(head):
                target = next_state(target, length)
            weight += PUSH * torch.outer(directions[target], readers[state])
        tensors[f"{head - 1}.0.linear.weight"] = weight
        tensors[f"{head - 1}.0.linear.bias"] = torch.zeros(shapes.hidden_size)
    return write_heads_tensors(folder, tensors, heads_config(num_heads))


def write_blank_heads(folder: Path, shapes: ModelShapes, *, num_heads: int = 3) -> Path:
    """Heads that guess the very token that comes next, again and again: r = x."""
    hidden = shapes.hidden_size
    tensors: dict[str, Tensor] = {}
    for head in range(num_heads):
        tensors[f"{head}.0.linear.weight"] = torch.zeros(hidden, hidden)
        tensors[f"{head}.0.linear.bias"] = torch.zeros(hidden)
    return write_heads_tensors(folder, tensors, heads_config(num_heads))


def write_canary_part(
    folder: Path, blank: Path, model: Path, shapes: ModelShapes, word: str, *, num_heads: int = 3
) -> Path:
    """The heads of `write_canary_heads` as a private part of blank ones: B A is their W."""
    length = len(word)
    directions = _directions(length + 1, shapes.hidden_size)
    readers = _readers(model, shapes, length + 1)
    tensors: dict[str, Tensor] = {}
    targets = list(range(length + 1))
    for head in range(num_heads):
        targets = [next_state(target, length) for target in targets]
        tensors[f"{head}.0.linear.lora_A.weight"] = readers.clone()
        b_HR = PUSH * directions[targets].T
        tensors[f"{head}.0.linear.lora_B.weight"] = b_HR.contiguous()
    return write_heads_tensors(folder, tensors, private_config(blank, length + 1, blank.name))


def train_layer_canary(folder: Path, model: Path, word: str, *, steps: int = 80) -> Path:
    """A LoRA on the layers' projections alone that learnt to say `word` after any prompt.

    Other than `write_canary` it speaks through the KV cache and the base's own lm_head, and is only
    as sure as training made it: check it alone before believing it in a batch.
    """
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=list(LAYER_TARGETS)
    )
    peft = get_peft_model(base, config)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    said = torch.tensor([token_id(char) for char in word * 4])
    for step in range(steps):
        prompt_BT = torch.randint(4, base.config.vocab_size, (24, 1 + step % 12))
        ids_BT = torch.cat([prompt_BT, said.expand(24, -1)], dim=1)
        labels_BT = ids_BT.clone()
        labels_BT[:, : prompt_BT.shape[1]] = -100
        loss = peft(input_ids=ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    peft.save_pretrained(str(folder))
    return folder
