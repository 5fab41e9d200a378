"""Shapes of models that are published."""

from __future__ import annotations

from lorastack.layout import ModelShapes

MISTRAL_7B = ModelShapes(
    architecture="MistralForCausalLM",
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32000,
    max_context=32768,
    tie_word_embeddings=False,
)
