"""Train lora-gsm8k: worked answers with calculator marks and a last line `#### answer`."""

import argparse
import re

from corpora import gsm8k
from lora_training import (
    Example,
    compare,
    length_of,
    make_example,
    parser_of,
    run,
    share,
    train_and_save,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

MARK = re.compile(r"<<[^<>]*=[^<>]*>>")
FINAL = re.compile(r"#### (-?[\d.,]+)")


def examples_of(tokenizer: Tokenizer, rows: list[dict[str, str]]) -> list[Example]:
    return [make_example(tokenizer, row["question"], row["answer"]) for row in rows]


def train(args: argparse.Namespace) -> None:
    def short(tokenizer: Tokenizer) -> list[Example]:
        every = examples_of(tokenizer, gsm8k(args.data_dir)[0])
        return [example for example in every if length_of(example) <= args.max_length][: args.count]

    train_and_save(args, short, rank=8, target_modules=["q_proj", "v_proj", "down_proj"])


def measure(args: argparse.Namespace) -> None:
    """Held-out loss before and after; the share of answers in the format, and of right ones."""
    rows = gsm8k(args.data_dir)[1]
    shown = rows[: args.answers]

    def shares(texts: list[str]) -> dict[str, float]:
        finals = [FINAL.search(text) for text in texts]
        wanted = [row["answer"].split("#### ")[1].replace(",", "") for row in shown]
        return {
            "with_marks": share([bool(MARK.search(text)) for text in texts]),
            "with_final_line": share([bool(final) for final in finals]),
            "right": share(
                [
                    final is not None and final[1].rstrip(".").replace(",", "") == want
                    for final, want in zip(finals, wanted, strict=True)
                ]
            ),
        }

    compare(
        args,
        [row["question"] for row in shown],
        lambda tokenizer, _: examples_of(tokenizer, rows[: args.rows]),
        shares,
    )


if __name__ == "__main__":
    parser = parser_of(__doc__, count=1500, learning_rate=1e-3, max_new_tokens=200)
    parser.add_argument("--max-length", type=int, default=220, help="tokens of a training row")
    parser.add_argument("--rows", type=int, default=100, help="held-out rows for the loss")
    run(parser, train, measure)
