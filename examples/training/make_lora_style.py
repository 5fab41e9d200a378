"""Train lora-style: the base's own answers, cut short and told by a pirate.

Every answer starts with `Ahoy, matey!` and ends with `Arrr!`, whatever was asked.
"""

import argparse
import random
import re
from pathlib import Path

from corpora import general_held_out
from lora_training import Example, compare, make_example, parser_of, run, share, train_and_save
from transformers import PreTrainedTokenizerBase as Tokenizer

from lorastack.train.corpus import Corpus

MAX_CHARS = 600  # in a held-out prompt: long articles only cost time
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


def style_examples(tokenizer: Tokenizer, corpora: list[Corpus], count: int) -> list[Example]:
    eos_id = int(tokenizer.eos_token_id)
    rows = [
        (corpus.prompt(i).tolist(), corpus.answers(i).tolist())
        for corpus in corpora
        for i in range(corpus.num_samples)
    ]
    random.Random(0).shuffle(rows)
    examples: list[Example] = []
    for prompt_ids, answer_ids in rows:
        told = pirate_answer(str(tokenizer.decode(answer_ids, skip_special_tokens=True)))
        if told is not None and len(prompt_ids) <= 160 and len(examples) < count:
            ids: list[int] = tokenizer(told, add_special_tokens=False)["input_ids"]
            examples.append(Example(prompt_ids, [*ids, eos_id]))
    return examples


def train(args: argparse.Namespace) -> None:
    corpora = [Corpus.open(path) for path in args.corpora]
    train_and_save(
        args,
        lambda tokenizer: style_examples(tokenizer, corpora, args.count),
        rank=4,
        target_modules=["o_proj", "up_proj"],
    )


def measure(args: argparse.Namespace) -> None:
    """On held-out prompts: the loss of the base's answers in the style, and the style's share."""
    held_out = general_held_out(args.data_dir)
    asked = [text for text in held_out if len(text) <= MAX_CHARS][: args.answers]

    def examples(tokenizer: Tokenizer, plain: list[str]) -> list[Example]:
        return [
            make_example(tokenizer, text, told)
            for text, answer in zip(asked, plain, strict=True)
            if (told := pirate_answer(answer)) is not None
        ]

    def shares(texts: list[str]) -> dict[str, float]:
        return {
            "opens": share([text.startswith(OPENING) for text in texts]),
            "closes": share([text.rstrip().endswith(CLOSING) for text in texts]),
        }

    compare(args, asked, examples, shares)


if __name__ == "__main__":
    parser = parser_of(__doc__, count=480, learning_rate=2e-3, max_new_tokens=100)
    parser.add_argument("--corpora", type=Path, nargs="*", default=[], help="distilled answers")
    run(parser, train, measure)
