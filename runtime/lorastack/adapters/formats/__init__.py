"""Adapter folders: reading their files, and checks that they fit the base model."""
