"""The gRPC server: validation, statuses, dispatch between asyncio and the step thread."""
