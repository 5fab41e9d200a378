"""One file an op: its contract, a plain reference and the fast implementation. No policy."""
