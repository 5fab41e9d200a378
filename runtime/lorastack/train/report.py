"""What is written about trained heads: evaluation.json, the model card README.md, plot.png."""

from __future__ import annotations

import io
import json
import logging
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lorastack.train.joint_options import Drift, JointOptions
from lorastack.train.measure import NUM_RANKS, Summary
from lorastack.train.options import Trained, TrainOptions

log = logging.getLogger(__name__)

_SHOWN_RANKS = (1, 2, 3, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLora:
    """A LoRA that was learnt together with heads. drift: None if nothing was held out."""

    options: JointOptions
    drift: Drift | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where heads come from.

    name: their id. command: what made them, as it was given. loras: those of the model that they
    guess for, as a user names them. shared: the heads that they correct, "" for none. data: how
    the corpus was made (`Corpus.settings`). vocabulary_size: of the draft vocabulary, 0 for none;
    own_vocabulary: it lies beside the heads. coverage: the share of the corpus' tokens that it has.
    lora: what lies beside the heads, if it was learnt with them.
    """

    name: str
    base_model: str
    command: Sequence[str]
    data: Mapping[str, Any]
    loras: Sequence[str] = ()
    shared: str = ""
    vocabulary_size: int = 0
    own_vocabulary: bool = True
    coverage: float = 1.0
    lora: OwnLora | None = None


def evaluation(
    origin: Origin, options: TrainOptions, trained: Trained, held_out: Summary | None
) -> dict[str, Any]:
    """evaluation.json: numbers are rounded to four places, and null where nothing was counted."""
    heads = trained.heads
    facts = {
        "name": origin.name,
        "base_model": origin.base_model,
        "loras": list(origin.loras),
        "shared_heads": origin.shared or None,
        "num_heads": heads.num_heads,
        "num_layers": heads.num_layers,
        "private_rank": heads.private_rank,
        "draft_vocabulary": {"size": origin.vocabulary_size, "coverage": origin.coverage},
        "held_out": None if held_out is None else summary_json(held_out),
        "training": {
            "command": shlex.join(origin.command),
            "options": asdict(options),
            "positions": trained.num_positions,
            "best_epoch": trained.best,
            "seconds": trained.seconds,
            "history": [asdict(epoch) for epoch in trained.history],
        },
        "data": dict(origin.data),
    }
    if origin.lora is not None:
        facts["joint"] = asdict(origin.lora)
    rounded: dict[str, Any] = _rounded(facts)
    return rounded


def summary_json(held_out: Summary) -> dict[str, Any]:
    """What evaluation.json says of held-out prompts, rounded as there."""
    facts = {
        "prompts": held_out.num_samples,
        "tokens": held_out.num_positions,
        "loss_by_head": held_out.loss_K,
        "top_1_to_10_by_head": held_out.top_KR,
        "tokens_a_step": {
            "chain_by_length": {str(size): rate for size, rate in held_out.chain.items()},
            "tree_by_nodes": {str(size): rate for size, rate in held_out.trees.items()},
        },
    }
    rounded: dict[str, Any] = _rounded(facts)
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def card(origin: Origin, options: TrainOptions, trained: Trained, held_out: Summary | None) -> str:
    """The model card: what the heads are, how to make them again, what they are worth."""
    lines = [
        "---",
        f"base_model: {origin.base_model}",
        "---",
        "",
        f"# {origin.name}: {_title(origin)}",
        "",
        *_what(origin, trained),
        "",
        "## Training",
        "",
        f"    {shlex.join(origin.command)}",
        "",
        *_training(options, trained),
        "",
        "Data: the model's own answers.",
        "",
        *(f"- {key}: {json.dumps(value)}" for key, value in origin.data.items()),
        "",
        "## Measured on held-out prompts",
        "",
        *(["No prompts were held out."] if held_out is None else _measured(held_out)),
    ]
    return "\n".join(lines) + "\n"


def _title(origin: Origin) -> str:
    if origin.lora is not None:
        return f"a LoRA for {origin.base_model}, and Medusa heads that were learnt with it"
    return f"Medusa heads for {_adapted(origin)}"


def _adapted(origin: Origin) -> str:
    loras = f" with {' and '.join(origin.loras)}" if origin.loras else ""
    return origin.base_model + loras


def _what(origin: Origin, trained: Trained) -> Iterator[str]:
    heads = trained.heads
    blocks = "a residual block" if heads.num_layers == 1 else f"{heads.num_layers} residual blocks"
    if origin.shared:
        yield (
            f"A private part of rank {heads.private_rank}: it corrects the {heads.num_heads} heads "
            f"of {origin.shared}, which must be there too."
        )
    else:
        yield (
            f"{heads.num_heads} heads of {blocks} each on the model's own lm_head, in the Medusa "
            "version 2 layout, bfloat16."
        )
    if origin.lora is not None:
        yield (
            f"The LoRA, of rank {origin.lora.options.rank} on all linear layers, makes the model's "
            "text easier to guess and keeps near to the base model."
        )
        yield from _drift(origin.lora.drift)
        yield "The heads only guess what the model says with the LoRA: they change no token of it."
    else:
        yield "They only guess what the model says: decoding with them changes no token."
    if origin.vocabulary_size:
        whose = "`draft_vocabulary.safetensors`" if origin.own_vocabulary else origin.shared
        yield (
            f"{whose} names the {origin.vocabulary_size:,} tokens that they choose from: "
            f"{origin.coverage:.1%} of the training text."
        )


def _drift(drift: Drift | None) -> Iterator[str]:
    if drift is not None:
        yield (
            f"On answers of the base model to held-out prompts it is {drift.kl:.4f} nats a token "
            f"from it (KL), and holds the same token likeliest at {drift.same:.1%} of the places."
        )


def _training(options: TrainOptions, trained: Trained) -> Iterator[str]:
    yield (
        f"{trained.num_positions:,} positions, at most {options.epochs} epochs of "
        f"{options.batch_size:,} positions a step, AdamW, learning rate {options.learning_rate:g}, "
        f"cosine with {options.warmup:.0%} warm-up, no weight decay, seed {options.seed}. "
        f"The weights are those of epoch {trained.best}."
    )
    if options.soft_targets:
        yield "Targets are the model's own distribution over its likeliest tokens."


def _measured(held_out: Summary) -> Iterator[str]:
    heads = range(1, len(held_out.top_KR) + 1)
    yield (
        f"{held_out.num_samples:,} answers of {held_out.num_positions:,} tokens. Trees are static, "
        "and the best for this text."
    )
    yield ""
    yield f"| head | {' | '.join(f'{k} (t+{k + 1})' for k in heads)} |"
    yield f"|---|{'---|' * len(heads)}"
    for rank in _SHOWN_RANKS:
        shares = " | ".join(f"{row[rank - 1]:.3f}" for row in held_out.top_KR)
        yield f"| top-{rank} | {shares} |"
    yield ""
    yield "| tokens a step | |"
    yield "|---|---|"
    for length, rate in held_out.chain.items():
        yield f"| chain of {length} | {rate:.3f} |"
    for nodes, rate in held_out.trees.items():
        yield f"| tree of {nodes} nodes | {rate:.3f} |"


def plot(trained: Trained, held_out: Summary | None) -> bytes | None:
    """plot.png: losses by epoch and accuracies by rank. None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no plot: it needs matplotlib, which `pip install 'lorastack[train]'` brings")
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    epochs = [epoch.number for epoch in trained.history]
    for head in range(trained.heads.num_heads):
        held = [epoch.held_loss_K[head] for epoch in trained.history if epoch.held_loss_K]
        taught = [epoch.train_loss_K[head] for epoch in trained.history[1:]]
        (line,) = losses.plot(epochs[1:], taught, "--")
        if held:
            losses.plot(epochs, held, color=line.get_color(), label=f"head {head + 1}")
        if held_out is not None:
            ranks = range(1, NUM_RANKS + 1)
            accuracies.plot(ranks, held_out.top_KR[head], label=f"head {head + 1}")
    losses.set(xlabel="epoch", ylabel="loss, nats (dashed: training)")
    accuracies.set(xlabel="guesses", ylabel="share of held-out tokens among them", ylim=(0, 1))
    for axes in (losses, accuracies):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
