"""Adapters: folders into tensors, ids into digests on disk, host copies, device copies."""
