"""`python -m lorastack` and the `lorastack` script."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `lorastack.cli.main.main`; Ctrl-C is quiet during its slow import too."""
    try:
        from lorastack.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
