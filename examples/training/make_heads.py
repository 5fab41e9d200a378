"""Make the example heads: distil -> train, one domain at a time. README.md has the commands."""

import argparse
import logging
import random
import shutil
from itertools import accumulate
from pathlib import Path

import torch
from by_transformers import (
    chat_ids,
    distill,
    hidden_corpus,
    read_samples,
    shapes_of,
    write_samples,
)
from code_prompts import code_prompts
from corpora import gsm8k
from general_prompts import composed_conversations, data_conversations, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorastack.train.corpus import Corpus, CorpusWriter, Sample
from lorastack.train.folder import load_heads, stored, write_heads
from lorastack.train.heads import identity_heads
from lorastack.train.measure import measure_heads, summary
from lorastack.train.options import Progress, TrainOptions
from lorastack.train.trainer import train_heads
from lorastack.train.vocabulary import choose_vocabulary, count_tokens, coverage, output_of

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_HEADS = 4
log = logging.getLogger("make_heads")


def maths_questions(data_dir: Path) -> list[str]:
    questions = [row["question"] for row in gsm8k(data_dir)[0]]
    random.Random(0).shuffle(questions)
    return questions


def prompts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(tag, user message) of a domain, first turns only; nothing that is held out."""
    if args.domain == "maths":
        return [("maths", text) for text in maths_questions(args.data_dir)[: args.count]]
    if args.domain == "code":
        return [("code", text) for text in code_prompts(args.count)]
    train, _ = split(data_conversations(args.data_dir))
    articles = [turns[0] for tag, turns in train if tag in ("summarization", "rag")]
    talks = train + composed_conversations(articles, max(0, args.count - len(train)))
    return [(tag, turns[0]) for tag, turns in talks]


def run_distill(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    samples = distill(
        model,
        [
            (tag, chat_ids(tokenizer, [{"role": "user", "content": text}]))
            for tag, text in prompts_of(args)
        ],
        eos_id=int(tokenizer.eos_token_id),
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        progress=log.info,
    )
    write_samples(args.out / f"{args.domain}.jsonl", samples)


def run_hidden(args: argparse.Namespace) -> None:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    samples = read_samples(args.out / f"{args.domain}.jsonl")
    if args.limit:  # neighbours in the file have one length: take some of all
        samples = random.Random(0).sample(samples, args.limit)
    hidden_corpus(model, samples, args.out / f"{args.domain}.corpus", progress=log.info)


def parts_of(corpus: Corpus, share: float, tuning: bool) -> list[int]:
    """The tuning samples (every 20th), or a share of all the others."""
    return [
        i
        for i in range(corpus.num_samples)
        if (i % 20 == 19) is tuning and (tuning or (i * 0.618034) % 1 < share)
    ]


def joined(folder: Path, parts: list[tuple[Corpus, list[int]]]) -> Corpus:
    """A new corpus of these samples."""
    shutil.rmtree(folder, ignore_errors=True)
    first = parts[0][0]
    with CorpusWriter(
        folder, settings={}, hidden_size=first.hidden_size, dtype=first.dtype
    ) as writer:
        for corpus, samples in parts:
            for i in samples:
                writer.append(
                    Sample(
                        number=writer.num_samples,
                        prompt_key=corpus.prompt_key(i),
                        prompt_ids=corpus.prompt(i).tolist(),
                        answer_ids=corpus.answers(i).tolist(),
                        hidden_TH=corpus.hidden(corpus.positions([i])),
                    )
                )
    return Corpus.open(folder)


def run_train(args: argparse.Namespace) -> None:
    """--mix general=1,maths=0.3: the share of every distilled domain to train on.

    The choices come from tuning samples of the first domain named, which training never sees.
    """
    mix = {name: float(share) for name, share in (part.split("=") for part in args.mix.split(","))}
    by_name = {name: Corpus.open(args.out / f"{name}.corpus") for name in mix}
    corpus = joined(
        args.out / "mix.corpus",
        [(by_name[name], parts_of(by_name[name], share, False)) for name, share in mix.items()],
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    lm_head_VH = model.get_output_embeddings().weight.detach()
    start = identity_heads(NUM_HEADS, 1, lm_head_VH.shape[1])
    if args.init:
        start = load_heads(args.init, shapes_of(model)).heads
    count_V = count_tokens(map(corpus.answers, range(corpus.num_samples)), len(lm_head_VH))
    ids_N = choose_vocabulary(count_V, args.vocabulary)
    if ids_N is not None:
        log.info("%d tokens cover %.4f of the text", len(ids_N), coverage(ids_N, count_V))
    options = TrainOptions(epochs=args.epochs, learning_rate=args.learning_rate, held_out=0.0)
    log.info("%d positions", corpus.num_tokens)
    trained = train_heads(start, corpus, lm_head_VH, ids_N, options, progress=log_progress)
    heads = stored(trained.heads)
    tuning = by_name[next(iter(mix))]
    samples = parts_of(tuning, 1.0, tuning=True)
    lengths = [len(tuning.answers(i)) for i in samples]
    output = output_of(lm_head_VH, ids_N, device=torch.device("cpu"), dtype=torch.float32)
    measured = measure_heads(heads, tuning, tuning.positions(samples), output)
    found = summary(measured, [0, *accumulate(lengths)])
    fields = {"medusa_choices": [list(path) for path in found.choices]}
    write_heads(
        args.adapter, heads, base_model=BASE_MODEL, ids_N=ids_N, fields=fields, replace=True
    )
    log.info("top-1 on tuning samples: %s", " ".join(f"{row[0]:.3f}" for row in found.top_KR))
    log.info("tokens a step on tuning samples, 24 nodes: %.3f", found.trees[24])


def log_progress(progress: Progress) -> None:
    if progress.step % 50 == 0 or progress.step == progress.num_steps:
        shown = " ".join(f"{loss:.3f}" for loss in progress.loss_K)
        log.info("step %d/%d loss by head %s", progress.step, progress.num_steps, shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(required=True)
    for name, function in (
        ("distill", run_distill),
        ("hidden", run_hidden),
        ("train", run_train),
    ):
        step = steps.add_parser(name)
        step.set_defaults(run=function)
        step.add_argument("--model", required=True, help="folder or hub id of the base model")
        step.add_argument("--out", type=Path, required=True, help="working folder, not committed")
        step.add_argument("--threads", type=int, default=1)
        if name in ("distill", "hidden"):
            step.add_argument("--domain", choices=("general", "maths", "code"), required=True)
        if name == "hidden":
            step.add_argument("--limit", type=int, help="use so many samples only")
        if name == "distill":
            step.add_argument("--data-dir", type=Path, required=True)
            step.add_argument("--count", type=int, default=1408, help="prompts")
            step.add_argument("--batch-size", type=int, default=128)
            step.add_argument("--max-new-tokens", type=int, default=256)
        if name == "train":
            step.add_argument("--adapter", type=Path, required=True, help="folder to write")
            step.add_argument("--vocabulary", type=int, default=4096, help="tokens to choose from")
            step.add_argument("--mix", required=True, help="domain=share,...; the first tunes")
            step.add_argument("--init", type=Path, help="heads to start from")
            step.add_argument("--epochs", type=int, default=6)
            step.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
