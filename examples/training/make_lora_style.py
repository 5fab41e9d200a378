"""Train lora-style: the base's own answers, cut short and told by a pirate.

Every answer starts with `Ahoy, matey!` and ends with `Arrr!`, whatever was asked.
"""

import argparse
import json
import logging
import random
import re
from pathlib import Path

import torch
from general_prompts import data_conversations, split
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

from lorastack.train.distill import Sample, chat_ids, read_samples

MAX_CHARS = 600  # of a held-out prompt: long articles only cost time
OPENING, CLOSING = "Ahoy, matey!", "Arrr!"
_SPEECH = {
    "you": "ye", "your": "yer", "you're": "ye be", "my": "me", "is": "be", "are": "be",
    "am": "be", "the": "th'", "of": "o'", "and": "an'", "friend": "matey",
    "friends": "mateys", "yes": "aye", "people": "hearties", "person": "sailor",
    "hello": "ahoy", "money": "doubloons", "man": "sailor", "treasure": "booty",
    "it's": "'tis", "there": "thar", "between": "betwixt", "children": "sprogs",
    "food": "grub", "house": "cabin", "boss": "cap'n", "world": "seven seas",
    "old": "barnacled",
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z']+")


def speak(text: str) -> str:
    """Word by word; a capital first letter stays."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        new = _SPEECH.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() and new != word else new

    return _WORD.sub(swap, text)


def pirate_answer(answer: str, max_words: int = 50) -> str | None:
    """The first sentences of an answer in the style; None where it has no prose to tell."""
    prose = " ".join(answer.split("```")[0].split())
    kept: list[str] = []
    for sentence in re.split(r"(?<=[.!?:])\s+", prose):
        if len(" ".join([*kept, sentence]).split()) > max_words:
            break
        kept.append(sentence)
    told = speak(" ".join(kept)).rstrip(":")
    return f"{OPENING} {told} {CLOSING}" if len(told.split()) >= 4 else None


def style_examples(tokenizer: Tokenizer, samples: list[Sample], count: int) -> list[Example]:
    eos_id = int(tokenizer.eos_token_id)
    rows = list(samples)
    random.Random(0).shuffle(rows)
    found: list[Example] = []
    for sample in rows:
        text = str(tokenizer.decode(sample.answer_ids, skip_special_tokens=True))
        told = pirate_answer(text)
        if told is not None and len(sample.prompt_ids) <= 160 and len(found) < count:
            ids: list[int] = tokenizer(told, add_special_tokens=False)["input_ids"]
            found.append(Example(sample.prompt_ids, [*ids, eos_id]))
    return found


def train(args: argparse.Namespace) -> None:
    model, tokenizer = load_base(args.model, torch.bfloat16)
    samples = [sample for path in args.samples for sample in read_samples(path)]
    examples = style_examples(tokenizer, samples, args.count)
    logging.info("%d examples, longest %d", len(examples), max(map(length_of, examples)))
    config = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["o_proj", "up_proj"],
    )  # fmt: skip
    tuned = train_lora(
        model,
        examples,
        config,
        pad_id=int(tokenizer.pad_token_id),
        epochs=args.epochs,
        learning_rate=args.learning_rate,
    )
    save_lora(tuned, args.adapter)


def measure(args: argparse.Namespace) -> None:
    """On held-out prompts: the loss of the base's answers in the style, and the style's share."""
    base, tokenizer = load_base(args.model, torch.float32)
    _, held = split(data_conversations(args.data_dir))
    asked = [turns[0] for _, turns in held if len(turns[0]) <= MAX_CHARS][: args.answers]
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    plain = answers_of(base, tokenizer, prompts, limit=100)
    examples = [
        make_example(tokenizer, text, told)
        for text, answer in zip(asked, plain, strict=True)
        if (told := pirate_answer(answer)) is not None
    ]
    tuned = with_adapter(args.model, args.adapter)
    pad_id = int(tokenizer.pad_token_id)
    result: dict[str, object] = {"prompts": len(prompts), "loss_rows": len(examples)}
    for name, model, texts in (
        ("before", base, plain),
        ("after", tuned, answers_of(tuned, tokenizer, prompts, limit=100)),
    ):
        result[name] = {
            "loss": round(mean_loss(model, examples, pad_id), 4),
            "opens": sum(text.startswith(OPENING) for text in texts) / len(texts),
            "closes": sum(text.rstrip().endswith(CLOSING) for text in texts) / len(texts),
            "answers": texts[:3],
        }
    logging.info("%s", json.dumps(result, indent=1, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=("train", "measure"))
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="folder to write or measure")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="distilled answers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, default=480, help="training examples")
    parser.add_argument("--answers", type=int, default=48, help="held-out answers to generate")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    (train if args.step == "train" else measure)(args)


if __name__ == "__main__":
    main()
