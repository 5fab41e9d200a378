"""From configuration to a loaded model and a ready engine: everything that happens once."""
