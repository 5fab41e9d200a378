"""The default model: fetched, converted and kept once a machine."""
