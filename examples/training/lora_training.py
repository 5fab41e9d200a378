"""The part that the two example LoRAs share: chat examples, a loss on the answer only, PEFT."""

import argparse
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
IGNORED = -100
Step = Callable[[argparse.Namespace], None]
log = logging.getLogger("lora")


@dataclass(frozen=True, slots=True)
class Example:
    prompt_ids: list[int]
    answer_ids: list[int]  # ends with the end token, so that the adapter learns to stop


def make_example(tokenizer: Tokenizer, prompt: str, answer: str) -> Example:
    prompt_ids = chat_ids(tokenizer, prompt)
    answer_ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Example(prompt_ids, [*answer_ids, int(tokenizer.eos_token_id)])


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a user message, up to where the assistant's answer begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return ids


def length_of(example: Example) -> int:
    return len(example.prompt_ids) + len(example.answer_ids)


def make_batch(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids, labels), both [B, T] and right-padded; labels are IGNORED outside the answers.

    Labels are aligned with ids, so the model's own shift applies. Padding is told apart by
    position: pad and end token are the same id, and the end token must be learnt.
    """
    width = max(map(length_of, examples))
    ids_BT = torch.full((len(examples), width), pad_id)
    labels_BT = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        begin, end = len(example.prompt_ids), length_of(example)
        ids_BT[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        labels_BT[row, begin:end] = ids_BT[row, begin:end]
    return ids_BT, labels_BT


def answer_loss(model: nn.Module, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, int]:
    """(summed cross entropy, answer tokens). Logits exist at answer positions only."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden_BTH = base.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
    wanted_BT = labels_BT[:, 1:] != IGNORED
    logits_PV = base.get_output_embeddings()(hidden_BTH[:, :-1][wanted_BT]).float()
    targets_P = labels_BT[:, 1:][wanted_BT]
    return nn.functional.cross_entropy(logits_PV, targets_P, reduction="sum"), len(targets_P)


@torch.inference_mode()
def mean_loss(model: nn.Module, examples: Sequence[Example], pad_id: int) -> float:
    total, count = 0.0, 0
    for begin in range(0, len(examples), 16):
        loss, num_tokens = answer_loss(model, *make_batch(examples[begin : begin + 16], pad_id))
        total, count = total + float(loss), count + num_tokens
    return total / count


def train_lora(
    model: PreTrainedModel,
    examples: Sequence[Example],
    config: LoraConfig,
    *,
    pad_id: int,
    epochs: int,
    learning_rate: float,
    batch_size: int = 8,
) -> PeftModel:
    """AdamW, cosine with a short warm-up. Batches hold similar lengths, to save padding."""
    torch.manual_seed(0)
    rng = random.Random(0)
    tuned = get_peft_model(model, config)
    parameters = [weight for weight in tuned.parameters() if weight.requires_grad]
    log.info("%d trainable parameters", sum(weight.numel() for weight in parameters))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    order = sorted(range(len(examples)), key=lambda i: length_of(examples[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    steps, step = epochs * len(batches), 0
    for _ in range(epochs):
        rng.shuffle(batches)
        for batch in batches:
            warm = min(1.0, (step + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = (
                    learning_rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
                )
            ids_BT, labels_BT = make_batch([examples[i] for i in batch], pad_id)
            with torch.autocast("cpu", torch.bfloat16):
                loss, num_tokens = answer_loss(tuned, ids_BT, labels_BT)
            (loss / num_tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 20 == 0:
                log.info("step %d/%d loss %.3f", step, steps, float(loss) / num_tokens)
    return tuned


def save_lora(tuned: PeftModel, folder: Path) -> None:
    """PEFT's layout, weights in bfloat16, naming the published base instead of a local folder.

    PEFT would write a card of its own over ours, so it saves into another folder first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as saved:
        tuned.save_pretrained(saved)
        tensors = load_file(Path(saved) / "adapter_model.safetensors")
        config = json.loads((Path(saved) / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config["base_model_name_or_path"] = BASE_MODEL
    config["target_modules"] = sorted(config["target_modules"])  # a set: another order each run
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def load_base(model: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tokenizer]:
    """Train in bfloat16 (PEFT keeps the LoRA in float32), measure in float32.

    Eager attention: the backward pass of the fused one is slower on a CPU at these lengths.
    """
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
    return base, AutoTokenizer.from_pretrained(model)


def with_adapter(model: str, folder: Path) -> PreTrainedModel:
    """The saved adapter merged into a fresh float32 base: what is measured is what is shipped."""
    base, _ = load_base(model, torch.float32)
    merged: PreTrainedModel = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    return merged.train(False)


@torch.inference_mode()
def answers_of(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], limit: int = 200
) -> list[str]:
    """Greedy, fifty at a time."""
    pad_id = int(tokenizer.pad_token_id)
    answers: list[str] = []
    for begin in range(0, len(prompts), 50):
        batch = prompts[begin : begin + 50]
        width = max(map(len, batch))
        ids_BT = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in batch])
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
        found_BT = model.generate(
            ids_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=limit
        )
        answers += tokenizer.batch_decode(found_BT[:, width:], skip_special_tokens=True)
    return answers


def train_and_save(
    args: argparse.Namespace,
    examples_of: Callable[[Tokenizer], list[Example]],
    rank: int,
    target_modules: list[str],
) -> None:
    """On a bfloat16 base; alpha is 16, no dropout."""
    model, tokenizer = load_base(args.model, torch.bfloat16)
    examples = examples_of(tokenizer)
    log.info("%d examples, longest %d", len(examples), max(map(length_of, examples)))
    config = LoraConfig(
        r=rank,
        lora_alpha=16,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=target_modules,
    )
    tuned = train_lora(
        model,
        examples,
        config,
        pad_id=int(tokenizer.pad_token_id),
        epochs=args.epochs,
        learning_rate=args.learning_rate,
    )
    save_lora(tuned, args.adapter)


def compare(
    args: argparse.Namespace,
    prompts: list[str],
    examples_of: Callable[[Tokenizer, list[str]], list[Example]],
    shares_of: Callable[[list[str]], dict[str, float]],
) -> None:
    """Log the base without and with the adapter, in float32: loss, shares, the first answers.

    examples_of: the held-out examples for the loss, given the base's own answers.
    """
    base, tokenizer = load_base(args.model, torch.float32)
    tuned = with_adapter(args.model, args.adapter)
    ids = [chat_ids(tokenizer, text) for text in prompts]
    before, after = (
        answers_of(model, tokenizer, ids, args.max_new_tokens) for model in (base, tuned)
    )
    examples = examples_of(tokenizer, before)
    result: dict[str, object] = {"answers": len(prompts), "loss_rows": len(examples)}
    for name, model, texts in (("before", base, before), ("after", tuned, after)):
        loss = mean_loss(model, examples, int(tokenizer.pad_token_id))
        result[name] = {"loss": round(loss, 4), **shares_of(texts), "first": texts[:2]}
    log.info("%s", json.dumps(result, indent=1, ensure_ascii=False))


def share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 3)


def parser_of(doc: str | None, **defaults: float) -> argparse.ArgumentParser:
    """The options of both scripts; defaults by option name."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("step", choices=("train", "measure"))
    parser.add_argument("--model", required=True, help="folder or hub id of the base model")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="folder to write or measure")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--count", type=int, help="training examples")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--answers", type=int, default=48, help="held-out answers to generate")
    parser.add_argument("--max-new-tokens", type=int, help="of a held-out answer")
    parser.set_defaults(**defaults)
    return parser


def run(parser: argparse.ArgumentParser, train: Step, measure: Step) -> None:
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    (train if args.step == "train" else measure)(args)
