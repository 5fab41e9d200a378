"""The step loop: schedule, run, update. Knows no asyncio and no protobuf."""
