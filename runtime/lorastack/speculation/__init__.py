"""Drafting tokens with Medusa heads and accepting those that the model draws itself."""
