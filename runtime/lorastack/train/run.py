"""What a user asks of `lorastack train heads` and `lorastack train joint`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lorastack.config import AdapterConfig, EngineConfig, ModelConfig
from lorastack.train.distill import DistillOptions
from lorastack.train.joint_options import JointOptions
from lorastack.train.local import LocalEngine, Selection
from lorastack.train.options import TrainOptions
from lorastack.train.prompts import PromptFile
from lorastack.train.start import Start, StartOptions

DRAFT_VOCABULARY = 4096
# Of `options_of`: those that decide what the model answers and what is kept of it.
ANSWERS = (
    *("--prompts", "--model", "the tokenizer", "--dtype", "--device", "--quantize", "--lora"),
    *("--max-context", "--max-new-tokens", "--temperature", "--soft-targets", "--seed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsRun:
    """What a user asks for. command: as the model card shows it.

    adapters: the store that LoRAs and heads are read from; None: there is none. loras: (id, scale)
    pairs. distill, training: their seeds, and soft targets, agree. bundle: the only LoRA's own
    files lie beside the heads. joint: a LoRA of the base alone learns together with the heads, and
    lies beside them.
    """

    adapter_id: str
    prompts: Path
    work: Path
    model: ModelConfig
    engine: EngineConfig
    adapters: AdapterConfig | None
    loras: tuple[tuple[str, float], ...] = ()
    start: StartOptions = field(default_factory=StartOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    training: TrainOptions = field(default_factory=TrainOptions)
    draft_vocabulary: int = DRAFT_VOCABULARY
    bundle: bool = False
    joint: JointOptions | None = None
    restart: bool = False
    command: tuple[str, ...] = ()


def options_of(
    run: HeadsRun,
    prompts: PromptFile,
    engine: LocalEngine,
    selection: Selection,
    start: Start,
) -> dict[str, object]:
    """All that decides what comes out, by the names that a user knows."""
    model, training, joint = engine.model, run.training, run.joint
    lora: dict[str, object] = {}
    if joint is not None:
        lora = {
            "--rank": joint.rank,
            "--lora-learning-rate": joint.learning_rate,
            "--heads-weight": joint.heads_weight,
        }
    return lora | {
        "--id": run.adapter_id,
        "--prompts": f"sha256:{prompts.sha256}",
        "--model": model.fingerprint,
        "the tokenizer": model.tokenizer.digest,
        "--dtype": str(model.backend.dtype).removeprefix("torch."),
        "--device": model.backend.device.type,
        "--quantize": model.backend.quantization,
        "--lora": [f"{use.digest}:{use.scale:g}" for use in selection.loras],
        "--bundle": run.bundle,
        "--max-context": run.model.max_context,
        "--max-new-tokens": run.distill.max_new_tokens,
        "--temperature": run.distill.sampling.temperature,
        "--soft-targets": run.distill.num_top,
        "--continue-from": "" if start.shared else start.digest,
        "--from": start.digest if start.shared else "",
        "--private-rank": start.heads.private_rank,
        "--num-heads": start.heads.num_heads,
        "--num-layers": start.heads.num_layers,
        "--draft-vocabulary": run.draft_vocabulary,
        "--epochs": training.epochs,
        "--batch-size": training.batch_size,
        "--learning-rate": training.learning_rate,
        "--held-out": training.held_out,
        "--seed": training.seed,
    }
