"""Training of Medusa heads on a frozen base: self-distillation, hidden states, heads, measures."""
