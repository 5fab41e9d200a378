"""Paging benchmarks: thousands of adapters behind a device that holds a few dozen."""
