"""Trees of drafted tokens, and accepting those that the model samples itself."""
