"""OpenVINO GenAI's continuous batching, its steps counted here."""

from __future__ import annotations

import os
import time
from importlib.metadata import version

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.protocol import About, Done, Job, Load, serve

CACHE_GIB = 2
ALL = "all of this CPU"
WITHOUT_BFLOAT16 = ("AVX2", "AVX512_CORE")  # of oneDNN's names of limits


class OpenVino:
    """Reads a float16 GGUF, which it converts when it compiles.

    It computes in bfloat16 where the CPU does, else in float32; KV in two bytes either way. With
    its default there, KV in eight bits, and with four bytes it is as fast.
    """

    def __init__(self, load: Load) -> None:
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
        able = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        bfloat16 = able and limit not in WITHOUT_BFLOAT16  # the answer knows of no limit
        precision, kv = ("bf16", "bf16") if bfloat16 else ("f32", "f16")
        self.about = About(
            name=f"OpenVINO GenAI {version('openvino-genai')}",
            numbers=f"{precision}, {kv} KV",
            instructions=f"oneDNN's at most {limit}, its own not limited" if limit else ALL,
            mixed_loras=False,  # it checks that all adapters of a batch are equal
        )
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 4096
        scheduler.enable_prefix_caching = False
        properties = {
            "INFERENCE_NUM_THREADS": load.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": kv,
        }
        self._pipeline = genai.ContinuousBatchingPipeline(load.gguf, scheduler, "CPU", properties)
        self._requests = 0

    def generate(self, job: Job) -> Done:
        config = genai.GenerationConfig(
            max_new_tokens=job.new_tokens, ignore_eos=True, do_sample=False
        )
        began = time.perf_counter()
        handles = []
        for prompt in job.prompts:
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._requests, ids, config))
            self._requests += 1
        tokens: list[list[int]] = [[] for _ in handles]
        first, already = 0.0, 0
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for row, handle in zip(tokens, handles, strict=True):
                if handle.can_read():
                    row += next(iter(handle.read().values())).generated_ids
            if not first and all(tokens):
                first, already = time.perf_counter(), sum(map(len, tokens))
        ended = time.perf_counter()
        return Done(first - began, ended - first, sum(map(len, tokens)) - already, tokens)


if __name__ == "__main__":
    serve(OpenVino)
