"""An HTTP face of the service: a gRPC client behind routes that others' clients know."""
