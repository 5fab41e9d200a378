"""Make the example heads: distil -> train, one domain at a time. README.md has the commands."""

import argparse
import logging
import random
from pathlib import Path

import torch
from by_transformers import chat_ids, distill, hidden_corpus, read_samples, write_samples
from code_prompts import code_prompts
from corpora import gsm8k
from general_prompts import composed_conversations, data_conversations, split
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorastack.train.heads import MedusaHeads, TrainOptions, load_heads, save_heads, train_heads
from lorastack.train.hidden import HiddenCorpus
from lorastack.train.measure import rank_accuracies, search_choices, target_ranks, tokens_per_step
from lorastack.train.vocabulary import choose_vocabulary, coverage, save_vocabulary

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
    corpus = hidden_corpus(model, samples, num_heads=NUM_HEADS, progress=log.info)
    path = args.out / f"{args.domain}.hidden.pt"
    torch.save((corpus.hidden_TH, corpus.targets_TK, corpus.starts), path)


def parts_of(corpus: HiddenCorpus, share: float, tuning: bool) -> HiddenCorpus:
    """The tuning samples (every 20th), or a share of all the others."""
    picked = [
        i
        for i in range(corpus.num_samples)
        if (i % 20 == 19) is tuning and (tuning or (i * 0.618034) % 1 < share)
    ]
    slices = [slice(corpus.starts[i], corpus.starts[i + 1]) for i in picked]
    starts = [0]
    for part in slices:
        starts.append(starts[-1] + part.stop - part.start)
    return HiddenCorpus(
        torch.cat([corpus.hidden_TH[part] for part in slices]),
        torch.cat([corpus.targets_TK[part] for part in slices]),
        starts,
    )


def joined(corpora: list[HiddenCorpus]) -> HiddenCorpus:
    starts = [0]
    for corpus in corpora:
        starts += [starts[-1] + start for start in corpus.starts[1:]]
    return HiddenCorpus(
        torch.cat([corpus.hidden_TH for corpus in corpora]),
        torch.cat([corpus.targets_TK for corpus in corpora]),
        starts,
    )


def run_train(args: argparse.Namespace) -> None:
    """--mix general=1,maths=0.3: the share of every distilled domain to train on.

    The choices come from tuning samples of the first domain named, which training never sees.
    """
    mix = {name: float(share) for name, share in (part.split("=") for part in args.mix.split(","))}
    by_name = {name: HiddenCorpus(*torch.load(args.out / f"{name}.hidden.pt")) for name in mix}
    corpus = joined([parts_of(by_name[name], share, tuning=False) for name, share in mix.items()])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    lm_head_VH = model.get_output_embeddings().weight.detach()
    heads = MedusaHeads(NUM_HEADS, lm_head_VH.shape[1])
    if args.init:
        heads, _ = load_heads(args.init)
    options = TrainOptions(epochs=args.epochs, learning_rate=args.learning_rate)
    log.info("%d positions", len(corpus.hidden_TH))
    train_heads(heads, corpus, lm_head_VH, options, progress=log.info)
    save_heads(args.adapter, heads, BASE_MODEL)
    heads, _ = load_heads(args.adapter)
    tuning = parts_of(by_name[next(iter(mix))], 1.0, tuning=True)
    ranks_TK = target_ranks(heads, tuning, lm_head_VH.float())
    table = rank_accuracies(ranks_TK)
    choices = search_choices(ranks_TK)
    save_heads(args.adapter, heads, BASE_MODEL, choices)
    log.info("top-1 on tuning samples: %s", " ".join(f"{row[0]:.3f}" for row in table))
    tokens, steps = tokens_per_step(ranks_TK, tuning.starts, choices[:24])
    log.info("tokens a step on tuning samples, 24 nodes: %.3f", tokens / steps)


def run_vocabulary(args: argparse.Namespace) -> None:
    """Writes draft_vocabulary.safetensors into a heads folder, from the domains' distilled text."""
    files = [args.out / f"{domain}.jsonl" for domain in args.domains.split(",")]
    tokens = [id_ for path in files for sample in read_samples(path) for id_ in sample.answer_ids]
    vocab_size = AutoConfig.from_pretrained(args.model).vocab_size
    vocabulary = choose_vocabulary(tokens, args.size, vocab_size)
    save_vocabulary(args.adapter, vocabulary)
    log.info("%d tokens cover %.4f of the text", len(vocabulary), coverage(vocabulary, tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    steps = parser.add_subparsers(required=True)
    for name, function in (
        ("distill", run_distill),
        ("hidden", run_hidden),
        ("train", run_train),
        ("vocabulary", run_vocabulary),
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
        if name in ("train", "vocabulary"):
            step.add_argument("--adapter", type=Path, required=True, help="folder to write")
        if name == "vocabulary":
            step.add_argument("--domains", required=True, help="whose answers count: domain,...")
            step.add_argument("--size", type=int, default=8192, help="tokens")
        if name == "train":
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
