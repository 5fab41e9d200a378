"""Paging benchmarks: thousands of adapters behind a device that holds a few dozen."""

SERVING = ("-m", "benchmarks.paging.serving")  # a command of `local_server`
