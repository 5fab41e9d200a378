"""Train lora-gsm8k: worked answers with calculator marks and a last line `#### answer`."""

import argparse
import json
import logging
import re
from pathlib import Path

import torch
from corpora import gsm8k
from lora_training import (
    Example,
    answers_of,
    length_of,
    load_base,
    make_example,
    mean_loss,
    save_lora,
    train_lora,
    with_adapter,
)  # fmt: skip
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

MARK = re.compile(r"<<[^<>]*=[^<>]*>>")
FINAL = re.compile(r"#### (-?[\d.,]+)")


def examples_of(tokenizer: Tokenizer, rows: list[dict[str, str]]) -> list[Example]:
    return [make_example(tokenizer, row["question"], row["answer"]) for row in rows]


def train(args: argparse.Namespace) -> None:
    model, tokenizer = load_base(args.model, torch.bfloat16)
    examples = examples_of(tokenizer, gsm8k(args.data_dir)[0])
    short = [example for example in examples if length_of(example) <= args.max_length]
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    tuned = train_lora(
        model,
        short[: args.count],
        config,
        pad_id=int(tokenizer.pad_token_id),
        epochs=args.epochs,
        learning_rate=args.learning_rate,
    )
    save_lora(tuned, args.adapter)


def measure(args: argparse.Namespace) -> None:
    """Held-out loss before and after; the share of answers in the format, and of right ones."""
    base, tokenizer = load_base(args.model, torch.float32)
    rows = gsm8k(args.data_dir)[1][: args.rows]
    examples = examples_of(tokenizer, rows)
    tuned = with_adapter(args.model, args.adapter)
    pad_id = int(tokenizer.pad_token_id)
    shown = rows[: args.answers]
    prompts = [example.prompt_ids for example in examples[: args.answers]]
    result: dict[str, object] = {"rows": len(rows), "answers": len(shown)}
    for name, model in (("before", base), ("after", tuned)):
        texts = answers_of(model, tokenizer, prompts, args.max_new_tokens)
        finals = [FINAL.search(text) for text in texts]
        wanted = [row["answer"].split("#### ")[1] for row in shown]
        result[name] = {
            "loss": round(mean_loss(model, examples, pad_id), 4),
            "with_marks": sum(bool(MARK.search(text)) for text in texts) / len(texts),
            "with_final_line": sum(bool(final) for final in finals) / len(texts),
            "right": sum(
                final is not None and final[1].rstrip(".").replace(",", "") == want.replace(",", "")
                for final, want in zip(finals, wanted, strict=True)
            ) / len(texts),
            "first_answer": texts[0],
        }  # fmt: skip
    logging.info("%s", json.dumps(result, indent=1, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("train", "measure"))
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="folder to write or measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=1500, help="training rows")
    parser.add_argument("--max-length", type=int, default=220, help="tokens of a training row")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rows", type=int, default=100, help="held-out rows for the loss")
    parser.add_argument("--answers", type=int, default=50, help="held-out answers to generate")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    (train if args.step == "train" else measure)(args)


if __name__ == "__main__":
    main()
