"""How a step is computed: one module a kind of machine."""
