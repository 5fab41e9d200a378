"""Tiny random models of the Llama family as Hugging Face folders, with a byte-level tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from lorastack.layout import ModelShapes

if TYPE_CHECKING:  # models are slow to import, and the tokenizer does without
    from transformers import PreTrainedModel as HFModel

BOS, EOS, IM_START, IM_END = "<s>", "</s>", "<|im_start|>", "<|im_end|>"
SPECIALS = (BOS, EOS, IM_START, IM_END)
# A few merges, so that a token is not always one byte: single letters stay tokens of their own.
MERGES = (
    *(("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("o", "u"), ("Ġ", "t")),
    *(("Ġ", "a"), ("Ġ", "the"), ("in", "g"), ("an", "d"), ("Ġ", "and"), ("s", "t"), ("o", "r")),
    *(("e", "n"), ("e", "s"), ("a", "l"), ("r", "e"), ("Ã", "©"), ("Ġ", "w"), ("Ġ", "s")),
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB_SIZE = len(SPECIALS) + 256 + len(MERGES)

HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_CONTEXT = 64, 96, 4, 2, 32, 8192 * 2


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: any text encodes, any bytes decode; prompts start with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *alphabet, *(left + right for left, right in MERGES)]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def token_id(char: str) -> int:
    """The id of the single-byte token of an ASCII character."""
    token = build_tokenizer().token_to_id(char)
    assert token is not None, char
    return int(token)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json with a ChatML template, generation_config.json."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "chat_template": CHATML,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_CONTEXT,
        },
    )
    ids = [SPECIALS.index(EOS), SPECIALS.index(IM_END)]
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": SPECIALS.index(BOS), "eos_token_id": ids},
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def fill_randomly(model: HFModel, seed: int) -> None:
    """Every parameter from (seed, its name) alone: norms around 1, logits well spread."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "norm" in name:
                values = 1 + 0.1 * values.clamp(-3, 3)
            elif name.endswith("bias"):
                values = 0.2 * values
            elif "embed" in name:
                values = 0.5 * values
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                # Layers must outweigh the embedding, or a tied model only repeats its input.
                values = values * (4.0 / parameter.shape[-1] ** 0.5)
            else:
                values = values * (1.5 / parameter.shape[-1] ** 0.5)
            parameter.copy_(values)


def _write(folder: Path, model: HFModel, seed: int, max_shard_size: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fill_randomly(model, seed)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def shapes_of(folder: Path) -> ModelShapes:
    """ModelShapes from config.json, read apart from the code under test."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ModelShapes(
        architecture=config["architectures"][0],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab_size"],
        max_context=config["max_position_embeddings"],
        tie_word_embeddings=config["tie_word_embeddings"],
    )


def build_llama(
    folder: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """A LlamaForCausalLM folder; tied embeddings. overrides: fields of LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": SPECIALS.index(EOS),
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | overrides)))
    return _write(folder, model, seed, max_shard_size)


def build_mistral(
    folder: Path,
    *,
    seed: int = 1,
    num_layers: int = 3,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """A MistralForCausalLM folder: untied head, sliding window of 24, head_dim set apart."""
    from transformers import MistralConfig, MistralForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM + 4,
        "sliding_window": 24,
        "max_position_embeddings": MAX_CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": SPECIALS.index(BOS),
        "eos_token_id": SPECIALS.index(EOS),
    }
    model = MistralForCausalLM(MistralConfig(**(fields | overrides)))
    return _write(folder, model, seed, max_shard_size)
