"""Generation: from a message to a Request, and from events to responses."""
