"""The command line: flags to configuration or one client call."""

import os

# gRPC writes lines to stderr that any caller of a server can cause and that add nothing to our
# messages. It reads this when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
