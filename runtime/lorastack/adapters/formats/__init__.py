"""An adapter folder: its files, what they mean, whether they fit the base model."""
