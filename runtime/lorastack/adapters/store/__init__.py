"""Adapters on disk: blobs, manifests and the ids that name them, crash-safe."""
