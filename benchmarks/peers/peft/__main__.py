"""transformers, and PEFT's batch of different adapters, in a plain loop without generate()."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.protocol import About, Done, Job, Load, serve

BASE = "__base__"  # PEFT's name of rows without an adapter


class Peft:
    """Base batches run on a model without PEFT's layers, which cost time even when disabled.

    In bfloat16 where oneDNN multiplies it, else in float32: on AVX2 that is slower at one row, but
    twice as fast at eight and five times in a prompt.
    """

    def __init__(self, load: Load) -> None:
        bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self._dtype = torch.bfloat16 if bfloat16 else torch.float32
        self.about = About(
            name=f"PEFT {version('peft')}",
            numbers=str(self._dtype).removeprefix("torch."),
            instructions=torch.backends.cpu.get_cpu_capability(),
            mixed_loras=True,
        )
        torch.set_num_threads(load.threads)
        self._base = self._model(load.model)
        self._adapted: Any = None
        for name, folder in load.loras.items():
            # Its default would keep adapters in float32 beside bfloat16, which is slower.
            options: dict[str, Any] = {"adapter_name": name, "autocast_adapter_dtype": False}
            if self._adapted is None:
                self._adapted = PeftModel.from_pretrained(
                    self._model(load.model), folder, **options
                )
            else:
                self._adapted.load_adapter(folder, **options)
        if self._adapted is not None:
            self._adapted.eval()

    @torch.inference_mode()
    def generate(self, job: Job) -> Done:
        with self._rows(job.loras) as model:
            began = time.perf_counter()
            cache = DynamicCache(config=model.config)
            last = _step(model, torch.tensor(job.prompts), cache)
            first = time.perf_counter()
            tokens = [last]
            for _ in range(job.new_tokens - 1):
                last = _step(model, last, cache)
                tokens.append(last)
            ended = time.perf_counter()
        count = len(job.prompts) * (job.new_tokens - 1)
        return Done(first - began, ended - first, count, torch.cat(tokens, dim=1).tolist())

    def _model(self, folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype).eval()

    def _rows(self, loras: Sequence[Sequence[str]]) -> AbstractContextManager[Any]:
        if not any(loras):
            return nullcontext(self._base)
        names = [name for (name,) in (row or (BASE,) for row in loras)]
        return _Adapted(self._adapted, names)


class _Adapted:
    """Hooks that tell layers each row's adapter, set once a batch and not at each step.

    That is what PEFT's generate() does; its forward() sets and removes them every time.
    """

    def __init__(self, model: Any, names: list[str]) -> None:
        self._model = model
        self._hooks = model.base_model._enable_peft_forward_hooks(adapter_names=names)

    def __enter__(self) -> Any:
        self._hooks.__enter__()
        return self._model.get_base_model()

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


def _step(model: Any, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """The next token of every row, [rows, 1]."""
    out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
    return out.logits[:, -1].argmax(dim=-1, keepdim=True)


if __name__ == "__main__":
    serve(Peft)
