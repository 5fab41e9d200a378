"""The command line: flags to configuration or one client call."""

import os

# gRPC writes lines of its own to stderr, which any caller of a server can cause, and which say
# nothing that our messages do not. It reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
