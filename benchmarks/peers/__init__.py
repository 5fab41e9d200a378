"""Other engines for side-by-side runs, each in an environment of its own (`make peers`)."""
