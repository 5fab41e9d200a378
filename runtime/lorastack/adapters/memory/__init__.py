"""Adapters in memory: host copies, device copies, and who has to make room."""
