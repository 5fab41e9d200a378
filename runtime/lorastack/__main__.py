"""`python -m lorastack` and the `lorastack` script."""

from __future__ import annotations

import sys


def main() -> None:
    """See `lorastack.cli.main.main`, whose import takes a moment: Ctrl-C is quiet in it too."""
    try:
        from lorastack.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
