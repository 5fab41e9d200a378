"""From logits and parameters to tokens."""
