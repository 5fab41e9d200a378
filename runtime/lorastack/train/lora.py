"""A LoRA that learns: transformers runs the base, PEFT the LoRA on it, forward and backward.

It adapts the linear layers of every block, and leaves embedding and lm_head as they are: heads go
on choosing through the base's own lm_head, from a draft vocabulary.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.layout import LAYER_TARGETS
from lorastack.printable import error_line
from lorastack.train.folder import json_bytes

_CONFIG_NAME, _WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_ADAPTER = ".default"  # what PEFT calls the only one, in its parameters' names


def check_peft() -> None:
    """Raises FailedPreconditionError without PEFT."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise FailedPreconditionError(
            "joint training needs PEFT: pip install 'lorastack[train]'"
        ) from error


class LoraModel:
    """A frozen base model with a LoRA of scale 1, which begins as one that changes nothing."""

    def __init__(
        self, folder: Path, *, rank: int, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """folder: of the base model. seed: of A's first values; B begins as zero. dtype: of the
        base; the LoRA is float32.

        Raises InvalidArgumentError for a model that transformers cannot run.
        """
        check_peft()
        from peft import LoraConfig, get_peft_model

        base = _load(folder, dtype)
        self._config: Any = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(LAYER_TARGETS), task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own calls
            torch.manual_seed(seed)
            model: Any = get_peft_model(base.train(False).requires_grad_(False), self._config)
        self._model = model.train(False).to(device)
        self._decoder: Any = self._model.get_base_model().get_decoder()
        self._device = device

    def learnt(self) -> dict[str, Tensor]:
        """The tensors that training changes, by their names in the folder."""
        return {
            name.replace(_ADAPTER, ""): tensor
            for name, tensor in self._model.named_parameters()
            if tensor.requires_grad
        }

    def states(self, ids_T: Tensor) -> Tensor:
        """[T, H], after the final norm: of one text from its beginning, so nothing is padded."""
        output = self._decoder(input_ids=ids_T[None].to(self._device), use_cache=False)
        states_TH: Tensor = output.last_hidden_state[0]
        return states_TH

    @torch.no_grad()
    def round(self) -> None:
        """Rounds what was learnt to what `files` writes."""
        for tensor in self.learnt().values():
            tensor.copy_(tensor.bfloat16())

    def files(self, base_model: str) -> dict[str, bytes]:
        """The LoRA's files as PEFT writes them, in bfloat16. base_model: what it is for."""
        fields = {
            name: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for name, value in self._config.to_dict().items()
        }
        fields |= {"base_model_name_or_path": base_model, "inference_mode": True}
        weights = {
            name: tensor.detach().cpu().bfloat16().contiguous()
            for name, tensor in self.learnt().items()
        }
        return {_CONFIG_NAME: json_bytes(fields), _WEIGHTS_NAME: save(weights, {"format": "pt"})}


def _load(folder: Path, dtype: torch.dtype) -> Any:
    """The base model. Raises InvalidArgumentError if transformers cannot load it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # it would cut through that of the stages
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{folder}: transformers, which joint training needs, does not load this model: "
            f"{error_line(error)}"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bar()
