"""lorastack: one base model, many LoRA adapters and Medusa heads, chosen per row."""

__version__ = "0.1.0"
