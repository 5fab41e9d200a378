"""What a server says of itself: to its calls, to callers, to metrics, and to whoever started it."""

from __future__ import annotations

from lorastack import __version__
from lorastack.config import ServerConfig
from lorastack.service.calls.served import ServedModel
from lorastack.startup.model import LoadedModel
from lorastack.v1 import generation_pb2

FEATURES = (
    *("chat", "lora", "lora_stack", "logprobs", "medusa", "medusa_tree"),
    *("prompt_logprobs", "response_format", "return_prompt", "sampling", "seed"),
    *("stop_sequences", "time_limit"),
)


def served(loaded: LoadedModel, max_context: int) -> ServedModel:
    """What the service needs of a loaded model. max_context: in tokens."""
    backend = loaded.backend
    return ServedModel(
        name=loaded.name,
        fingerprint=loaded.fingerprint,
        tokenizer=loaded.tokenizer,
        vocab_size=backend.shapes.vocab_size,
        max_context=max_context,
        device=str(backend.device),
        dtype=str(backend.dtype).removeprefix("torch."),
        quantization=backend.quantization,
        backend=backend.name,
        lossless=loaded.lossless,
        kv_memory=loaded.kv_memory,
        threads=loaded.threads,
    )


def labels(model: ServedModel) -> dict[str, dict[str, str]]:
    """The labels of each info metric, by its name; they never change."""
    return {
        "build": {"version": __version__},
        "model": {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "backend": model.backend,
            "device": model.device,
            "dtype": model.dtype,
            "quantization": model.quantization,
        },
    }


def model_info(model: ServedModel, config: ServerConfig) -> generation_pb2.GetModelInfoResponse:
    """GetModelInfo's reply without default heads, which may change."""
    return generation_pb2.GetModelInfoResponse(
        base_model=model.name,
        fingerprint=model.fingerprint,
        tokenizer_digest=model.tokenizer.digest,
        limits=generation_pb2.Limits(
            max_context=model.max_context,
            max_rows=config.engine.max_rows,
            max_queue=config.engine.max_queue,
            kv_bytes=model.kv_memory,
            device_adapter_bytes=config.adapters.device_memory,
            host_adapter_bytes=config.adapters.host_memory,
        ),
        backend=model.backend,
        features=(*FEATURES, "lossless") if model.lossless else FEATURES,
        version=__version__,
        device=model.device,
        dtype=model.dtype,
        quantization=model.quantization,
        threads=model.threads,
    )


def ready_line(model: ServedModel, address: str, http_address: str = "") -> str:
    """The line that tells people that Generate works."""
    http = f" and http://{http_address}" if http_address else ""
    weights = f", weights {model.quantization}" if model.quantization else ""
    return (
        f"lorastack {__version__} serves {model.name} on {address}{http} "
        f"(backend {model.backend}, device {model.device}, dtype {model.dtype}{weights})"
    )
