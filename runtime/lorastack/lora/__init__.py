"""LoRA weights as views, the segments of a step, and the adapted linear layers."""
