"""The gRPC edge: validation, statuses, dispatch between asyncio and the step thread."""
