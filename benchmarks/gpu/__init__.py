"""Checks on a machine with a GPU: right or wrong, bits, speed, whole steps, drafts, paging.

Each stage is a process of its own. Nothing here runs in a server.
"""
