"""The decoder: tokens in, hidden states and logits out, everything as an argument."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm

from lorastack.kernels.linear import linear
from lorastack.layout import ModelShapes
from lorastack.lora.linear import add_embedding, add_lm_head
from lorastack.lora.segments import LoraBatch
from lorastack.model.backend import TorchBackend
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.context import ForwardBatch
from lorastack.model.kv import KVCache
from lorastack.model.weights import DecoderWeights, load_weights


class Decoder:
    """A base model's weights and the backend that runs them. Holds no state of a request."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        backend: TorchBackend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shapes: ModelShapes = config.shapes
        self.device = device
        self.dtype = dtype
        self._rms_eps = config.rms_eps
        self._weights = weights
        self._backend = backend

    @torch.no_grad()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """[T, H] after the final norm. Writes the step's keys and values into `kv`."""
        meta = self._backend.prepare(batch, kv)
        hidden_TH = embedding(batch.token_ids_T, self._weights.embed_VH)
        add_embedding(batch.token_ids_T, hidden_TH, batch.lora)
        for layer in self._weights.layers:
            hidden_TH = self._backend.layer(hidden_TH, layer, batch.lora, kv, meta)
        return rms_norm(hidden_TH, (hidden_TH.shape[-1],), self._weights.norm, self._rms_eps)

    @torch.no_grad()
    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """float32 [X, V] of states after the final norm. The segments index the X rows."""
        logits_XV = linear(hidden_XH, self._weights.lm_head).float()
        add_lm_head(hidden_XH, logits_XV, lora)
        return logits_XV


def load_decoder(
    path: Path, *, device: torch.device, dtype: torch.dtype, max_context: int | None
) -> Decoder:
    """Load a Hugging Face folder. InvalidArgumentError names what is not supported."""
    config = load_config(path, max_context)
    weights = load_weights(Checkpoint(path), config, device=device, dtype=dtype)
    return Decoder(config, weights, TorchBackend(config, device, dtype), device, dtype)


def fingerprint(path: Path) -> str:
    """sha256 over the model's shapes and its checkpoint's digest: two servers with the same one
    run the same weights. Reads a few KiB a tensor."""
    shapes = asdict(load_config(path, None).shapes)
    sha = hashlib.sha256(repr(sorted(shapes.items())).encode())
    sha.update(Checkpoint(path).digest())
    return f"sha256:{sha.hexdigest()}"
