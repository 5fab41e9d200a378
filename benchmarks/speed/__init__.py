"""Our speed end to end, beside the memory's limit and other engines (`make bench`)."""
