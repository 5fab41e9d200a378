"""`python -m lorastack` is the `lorastack` command."""

from lorastack.cli.main import main

if __name__ == "__main__":
    main()
