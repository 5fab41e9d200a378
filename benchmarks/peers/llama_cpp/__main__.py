"""llama.cpp through its C interface: one batch of sequences, greedy."""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import llama_cpp as ll
import numpy as np

from benchmarks.peers.protocol import About, Done, Job, Load, serve

MAX_BATCH = 2048  # tokens in one call; llama.cpp's own default
CELLS = 256  # a sequence's cache grows in steps of this


class LlamaCpp:
    """A context fits one number of sequences of one length, and is kept until another is asked."""

    def __init__(self, load: Load) -> None:
        self.about = About(
            name=f"llama.cpp {version('llama-cpp-python')}",
            numbers=f"{Path(load.gguf).stem.lower()} weights, f16 KV",
            instructions=compiled(),
            mixed_loras=False,  # adapters are a context's, not a sequence's
        )
        self._threads = load.threads
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        params.use_mmap = False
        self._model = ll.llama_model_load_from_file(load.gguf.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot read {load.gguf}")
        self._vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._size = (0, 0)
        self._context: ll.llama_context_p | None = None

    def generate(self, job: Job) -> Done:
        context = self._resized(len(job.prompts), len(job.prompts[0]) + job.new_tokens)
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        began = time.perf_counter()
        last = self._prefill(context, job.prompts)
        first = time.perf_counter()
        tokens = [[token] for token in last]
        batch = ll.llama_batch_init(len(last), 0, 1)
        for step in range(job.new_tokens - 1):
            batch.n_tokens = 0
            for row, token in enumerate(last):
                _add(batch, token, len(job.prompts[row]) + step, row, wanted=True)
            last = self._decode(context, batch)
            for row, token in enumerate(last):
                tokens[row].append(token)
        ended = time.perf_counter()
        ll.llama_batch_free(batch)
        return Done(first - began, ended - first, len(last) * (job.new_tokens - 1), tokens)

    def _prefill(self, context: ll.llama_context_p, prompts: Sequence[Sequence[int]]) -> list[int]:
        """The first token of every row."""
        batch = ll.llama_batch_init(MAX_BATCH, 0, 1)
        first_tokens: list[int] = []
        for row, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                _add(batch, token, position, row, wanted=position == len(prompt) - 1)
                if batch.n_tokens == MAX_BATCH:
                    first_tokens += self._decode(context, batch)
                    batch.n_tokens = 0
        first_tokens += self._decode(context, batch) if batch.n_tokens else []
        ll.llama_batch_free(batch)
        return first_tokens

    def _decode(self, context: ll.llama_context_p, batch: ll.llama_batch) -> list[int]:
        """The best token of every position that wants one."""
        if ll.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        rows = sum(batch.logits[index] for index in range(batch.n_tokens))
        if not rows:
            return []
        address = ctypes.cast(ll.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(address, (rows, self._vocab))
        return [int(token) for token in logits.argmax(axis=1)]

    def _resized(self, rows: int, length: int) -> ll.llama_context_p:
        cells = -(-length // CELLS) * CELLS
        if self._context is None or self._size != (rows, cells):
            if self._context is not None:
                ll.llama_free(self._context)
            params = ll.llama_context_default_params()
            params.n_ctx = rows * cells
            params.n_seq_max = rows
            params.n_batch = MAX_BATCH
            params.n_threads = params.n_threads_batch = self._threads
            self._context = ll.llama_init_from_model(self._model, params)
            self._size = (rows, cells)
        return self._context


def compiled() -> str:
    """The instructions that it was compiled with; no variable limits them later."""
    features: str = ll.llama_print_system_info().decode()
    names = re.findall(r"(\w*(?:AVX|FMA|F16C|AMX|NEON|SVE|DOTPROD|MATMUL)\w*) = 1", features)
    return f"{' '.join(names)}, compiled in"


def _add(batch: ll.llama_batch, token: int, position: int, row: int, *, wanted: bool) -> None:
    index = batch.n_tokens
    batch.token[index] = token
    batch.pos[index] = position
    batch.n_seq_id[index] = 1
    batch.seq_id[index][0] = row
    batch.logits[index] = wanted
    batch.n_tokens = index + 1


if __name__ == "__main__":
    serve(LlamaCpp)
