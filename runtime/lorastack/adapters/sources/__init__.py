"""Where a pull takes adapters from: a hub, a folder on the server."""
