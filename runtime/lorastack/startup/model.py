"""From configuration to a base model in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from lorastack.adapters.formats.validate import Validator
from lorastack.config import MIB, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.kernels.native.isa import Isa, isa_named
from lorastack.kernels.native.library import library
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.base import Backend
from lorastack.model.backends.choose import Choice, choose
from lorastack.model.backends.load import read_backend
from lorastack.model.backends.parallel.backend import ParallelBackend
from lorastack.model.backends.parallel.crew import Crew
from lorastack.model.backends.parallel.shards import Shard, shard_config
from lorastack.model.config import DecoderConfig
from lorastack.model.fetch.download import Progress
from lorastack.model.size import weights_nbytes
from lorastack.startup.device import find_device
from lorastack.startup.files import ModelFiles
from lorastack.startup.folder import model_folder
from lorastack.startup.memory import (
    RESERVE,
    Demand,
    available_memory,
    check_fits,
    count_pages,
    default_kv,
)
from lorastack.startup.prior import check_acceptance
from lorastack.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

StartupProgress = Callable[[str, int, int], None]  # what is going on; bytes done, bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A base model in memory with its tokenizer. name: hub id, or the folder's name.

    kv_memory: bytes for keys and values beside it; num_pages: the pages that they hold. lossless:
    see `Choice`. threads: CPU threads of a step. crew: the processes of the other devices that
    share the model, all of which have so many bytes, pages and threads.
    """

    backend: Backend
    tokenizer: Tokenizer
    name: str
    files: ModelFiles
    fingerprint: str
    kv_memory: int
    num_pages: int
    lossless: bool
    threads: int
    crew: Crew | None

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """on_failure: called, from any thread, when a device that shares the model is lost."""
        if self.crew is not None:
            self.crew.watch(on_failure)

    def validator(self, base_names: Sequence[str]) -> Validator:
        """Checks adapters for this model. base_names: further names of it that they may state."""
        return Validator(
            shapes=self.backend.shapes,
            dtype=self.backend.dtype,
            base_names=(self.name, self.files.folder.name, *base_names),
            base_weight=self.files.base_weight,
            base_token=self.tokenizer.token_id,
            check_acceptance=check_acceptance,
        )

    def close(self) -> None:
        """Ends the processes of the other devices. No step may run any more."""
        if self.crew is not None:
            self.crew.close()


def load_model(
    config: ModelConfig,
    engine: EngineConfig,
    adapter_memory: int,
    progress: StartupProgress = lambda label, done, total: None,
) -> LoadedModel:
    """Weights and tokenizer from a folder, a hub id, or the embedded default.

    adapter_memory: bytes that must be there beside weights and KV. Raises, before any weight is
    read, InvalidArgumentError for a model, a device, a backend or instructions that cannot run
    here, and FailedPreconditionError for more memory than the device has or less KV than two pages.
    """
    device, at_most = find_device(config.device, config.tensor_parallel), isa_named(config.isa)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.tensor_parallel > 1 and device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // config.tensor_parallel))
    path, name = model_folder(config.model, partial(progress, "fetching the default model"))
    with ThreadPoolExecutor(1) as beside:  # the weights, which hardly need the interpreter
        tokenizer = beside.submit(Tokenizer.load, path)
        files = ModelFiles(path, config.max_context)
        choice = _choose(config, files.config, device, at_most, name)
        largest = shard_config(files.config, Shard(choice.shards - 1, choice.shards))
        kv_memory = _kv_memory(largest, choice, engine, adapter_memory)
        num_pages = count_pages(largest.shapes, choice.dtype, kv_memory, engine.page_size)
        checkpoint = files.checkpoint.reporting(_reporter(progress, tokenizer))
        backend = read_backend(checkpoint, files.config, choice)
    _warn_of_unknown_tokens(tokenizer.result(), backend.shapes.vocab_size)
    return LoadedModel(
        backend=backend,
        tokenizer=tokenizer.result(),
        name=name,
        files=files,
        fingerprint=files.fingerprint(),
        kv_memory=kv_memory,
        num_pages=num_pages,
        lossless=choice.lossless,
        threads=torch.get_num_threads(),
        crew=backend.crew if isinstance(backend, ParallelBackend) else None,
    )


def _reporter(progress: StartupProgress, tokenizer: Future[Tokenizer]) -> Progress:
    """Reports the reading of the weights, and ends it once the tokenizer is refused."""

    def report(done: int, total: int) -> None:
        if tokenizer.done():
            tokenizer.result()
        progress("loading the weights", done, total)

    return report


def _choose(
    config: ModelConfig,
    model: DecoderConfig,
    device: torch.device,
    at_most: Isa | None,
    name: str,
) -> Choice:
    """What runs the model; steps that are slower than they might be are refused or logged."""
    choice = choose(
        model,
        device=device,
        dtype=_dtype(config.dtype),
        native=config.backend in ("auto", "native"),
        kind=None if config.quantize is None else Kind(config.quantize),
        at_most=at_most,
        shards=config.tensor_parallel,
        triton={"auto": None, "triton": True}.get(config.backend, False),
    )
    if why := choice.why_not_triton:
        if config.backend == "triton":
            raise InvalidArgumentError(
                f"--backend triton: {why}; or leave --backend out", reason=Reason.INVALID_MODEL
            )
        log.warning("%s: steps run in plain torch, which is slower", why)
    why = choice.why_torch(name)
    if config.backend == "native" and choice.isa is None:
        why = why or f"the native kernels run on a CPU, not on {device.type}"
        raise InvalidArgumentError(
            f"--backend native: {why}; or leave --backend out", reason=Reason.INVALID_MODEL
        )
    dtype_name = str(choice.dtype).removeprefix("torch.")
    if why and library() is not None:  # a library that is not there was logged already
        log.warning("%s: steps run in plain torch (%s), which is slower", why, dtype_name)
    if not choice.lossless:
        log.warning(
            "%s in plain torch: at a near-tie of two tokens a row may take another one beside "
            "other rows or with drafts; --dtype float32 keeps them",
            dtype_name,
        )
    elif device.type == "cuda" and config.dtype == "auto":
        log.info("--dtype auto is float32 here: bfloat16 in plain torch is not lossless")
    return choice


def _kv_memory(
    model: DecoderConfig, choice: Choice, engine: EngineConfig, adapter_memory: int
) -> int:
    """Bytes for keys and values, if there is room for all that is to come.

    model: what one device has of it.
    """
    device, dtype, wanted = choice.device, choice.dtype, engine.kv_memory
    available = available_memory(device)
    if available is None:
        return engine.most_kv if wanted is None else wanted
    if choice.triton:
        from lorastack.model.backends.triton.reserve import reserved_nbytes

        reserve = RESERVE if device.type == "cuda" else 0  # what is counted already
        available -= max(0, reserved_nbytes(model.shapes, dtype, choice.kind) - reserve)
    weights = weights_nbytes(model, dtype, choice.kind, device)
    others = {f"--quantize {kind}": weights_nbytes(model, dtype, kind, device) for kind in Kind}
    if device.type == "cuda":
        others = others if choice.triton else {}
        others["--dtype bfloat16"] = weights_nbytes(model, torch.bfloat16, None, device)
    elif choice.shards > 1:
        others, available = {}, available // choice.shards
    smaller = {option: size for option, size in others.items() if size < weights}
    left = available - weights - adapter_memory
    kv = default_kv(device, left, engine.most_kv) if wanted is None else wanted
    where = f"for each of {choice.shards} devices" if choice.shards > 1 else "here"
    check_fits(Demand(weights=weights, kv=kv, adapters=adapter_memory), available, smaller, where)
    if device.type == "cuda":
        log.info(
            "the GPU has %d MiB free: weights get %d, adapters %d, keys and values %d",
            *(each // MIB for each in (available, weights, adapter_memory, kv)),
        )
    if wanted is None and kv < engine.most_kv:
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


def _dtype(name: str) -> torch.dtype | None:
    """None for auto, which `choose` decides."""
    if name == "auto":
        return None
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
