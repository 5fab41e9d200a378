"""The decoder of the Llama/Mistral family, its weights and its KV tensor."""
