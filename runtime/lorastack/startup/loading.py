"""From configuration to a loaded model and a ready engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from lorastack.adapters.memory.loader import Loader
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.store.registry import Registry
from lorastack.config import MIB, EngineConfig, ModelConfig
from lorastack.engine.costs import measure
from lorastack.engine.engine import Engine
from lorastack.engine.pages import Pages
from lorastack.engine.runner import Runner
from lorastack.errors import FailedPreconditionError, InvalidArgumentError, Reason
from lorastack.kernels.native.library import library, missing
from lorastack.kernels.packing import allocate
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.base import Backend
from lorastack.model.config import DecoderConfig, load_config
from lorastack.model.decoder import default_dtype, fingerprint, load_decoder
from lorastack.model.kv import page_nbytes
from lorastack.model.size import weights_nbytes
from lorastack.request import RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.startup.folder import model_folder
from lorastack.startup.memory import LEAST_KV, MOST_KV, Demand, available_memory, check_fits
from lorastack.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # what is going on; bytes done, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A base model in memory with its tokenizer. name: hub id, or the folder's name.

    kv_memory: bytes for keys and values beside it. threads: of the CPU, in a step.
    """

    decoder: Backend
    tokenizer: Tokenizer
    name: str
    path: Path
    fingerprint: str
    kv_memory: int
    threads: int


def load_model(
    config: ModelConfig,
    kv_memory: int | None,
    adapter_memory: int,
    progress: Progress = lambda label, done, total: None,
) -> LoadedModel:
    """Weights and tokenizer from a folder, a hub id, or the embedded default.

    kv_memory, adapter_memory: bytes that must be there beside the weights; None: what is left, up
    to 4 GiB. Raises InvalidArgumentError for an unknown or unsupported model or device,
    FailedPreconditionError, before any weight is read, for more than the device has.
    """
    device = _device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path, name = model_folder(config.model, partial(progress, "fetching the default model"))
    native = config.backend != "torch"
    with ThreadPoolExecutor(1) as beside:  # the weights: they hardly need the interpreter
        tokenizer = beside.submit(Tokenizer.load, path)
        shown = load_config(path, config.max_context)
        dtype = _dtype(config.dtype) or default_dtype(shown, device, native)
        kv_memory = _kv_memory(config, shown, dtype, device, kv_memory, adapter_memory)
        decoder = load_decoder(
            path,
            device=device,
            dtype=dtype,
            max_context=config.max_context,
            native=native,
            quantize=config.quantize,
            progress=partial(progress, "loading the weights"),
        )
    if native and device.type == "cpu" and not decoder.name.startswith("native"):
        why = missing(decoder.dtype) or f"no native kernels run {name} with these options"
        if config.backend == "native":
            raise InvalidArgumentError(
                f"--backend native: {why}; or leave --backend out", reason=Reason.INVALID_MODEL
            )
        if library() is not None:  # which says so itself
            dtype_name = str(decoder.dtype).removeprefix("torch.")
            log.warning("%s: steps run in plain torch (%s), which is slower", why, dtype_name)
    _warn_of_unknown_tokens(tokenizer.result(), decoder.shapes.vocab_size)
    return LoadedModel(
        decoder=decoder,
        tokenizer=tokenizer.result(),
        name=name,
        path=path,
        fingerprint=fingerprint(path),
        kv_memory=kv_memory,
        threads=torch.get_num_threads(),
    )


def _kv_memory(
    config: ModelConfig,
    decoder: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    wanted: int | None,
    adapter_memory: int,
) -> int:
    """Bytes for keys and values, if there is room for all that is to come."""
    available = available_memory(device)
    if available is None:
        return MOST_KV if wanted is None else wanted
    sizes = {kind: weights_nbytes(decoder, dtype, kind, device) for kind in (None, *Kind)}
    weights = sizes[None if config.quantize is None else Kind(config.quantize)]
    smaller = {f"--quantize {kind}": size for kind, size in sizes.items() if size < weights}
    kv = wanted
    if kv is None:
        kv = min(MOST_KV, max(LEAST_KV, available - weights - adapter_memory))
    check_fits(Demand(weights=weights, kv=kv, adapters=adapter_memory), available, smaller)
    if wanted is None and kv < MOST_KV:
        log.warning("keys and values get the %d MiB that are left; --kv-memory sets it", kv // MIB)
    return kv


def _warn_of_unknown_tokens(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        log.warning(
            "the tokenizer has ids up to %d, the model only those below %d: prompts with others "
            "are refused",
            tokenizer.vocab_size - 1,
            vocab_size,
        )


def adapter_loader(model: LoadedModel, registry: Registry) -> Loader:
    """What loads an adapter in the form that this model's backend reads."""
    decoder = model.decoder
    return Loader(
        registry=registry,
        shapes=decoder.shapes,
        allocate=partial(allocate, dtype=decoder.dtype, pinned=decoder.device.type == "cuda"),
        head_rows=decoder.head_rows,
    )


def build_engine(
    model: LoadedModel,
    config: EngineConfig,
    pool: DevicePool,
    learned: Mapping[str, str],
    on_events: Callable[[list[RowEvent]], None],
    on_failure: Callable[[BaseException], None],
) -> Engine:
    """The engine on a loaded model.

    learned: what an earlier one knew about heads, by digest (`Engine.learned`, as JSON). Any
    request within `Engine.max_context` fits in its KV memory.
    """
    decoder = model.decoder
    shapes = decoder.shapes
    nbytes = page_nbytes(shapes, config.page_size, decoder.dtype)
    num_pages = model.kv_memory // nbytes
    max_context = min(shapes.max_context, num_pages * config.page_size)
    if num_pages < 2:
        raise FailedPreconditionError(
            f"--kv-memory holds {num_pages} pages of {nbytes} bytes; give it at least "
            f"{page_nbytes(shapes, shapes.max_context, decoder.dtype)} bytes for one full context",
            reason=Reason.INVALID_MODEL,
        )
    if max_context < shapes.max_context:
        log.warning(
            "--kv-memory holds %d tokens: the context is limited to that, the model allows %d",
            max_context,
            shapes.max_context,
        )
    kv = decoder.make_kv(num_pages, config.page_size)
    runner, pages = Runner(decoder, kv), Pages(num_pages, config.page_size)
    return Engine(
        config=config,
        runner=runner,
        tokenizer=model.tokenizer,
        pages=pages,
        pool=pool,
        costs=measure(runner, pages),
        calibrations={digest: Calibration.from_json(text) for digest, text in learned.items()},
        max_context=max_context,
        vocab_size=shapes.vocab_size,
        on_events=on_events,
        on_failure=on_failure,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError("--device cuda: torch finds no CUDA device; use cpu or auto")
    return torch.device(name)


def _dtype(name: str) -> torch.dtype | None:
    """None for auto, which the decoder chooses."""
    if name == "auto":
        return None
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
