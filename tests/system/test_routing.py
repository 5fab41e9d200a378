"""The published rule of a LoRA-affinity scorer, fed with the scrape of a live server."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from lorastack.client import Client
from lorastack.config import AdapterConfig
from lorastack.layout import ModelShapes
from tests.helpers.adapters import write_lora
from tests.helpers.live import ROOMY, LiveServer, ask, wait_until

NAMES = ("a", "b", "c")


def affinity(client: Client, model: str) -> float:
    """What llm-d-router's lora-affinity-scorer gives a replica for this model."""
    scrape = client.metrics().body.decode()
    (labels,) = (
        sample.labels
        for family in text_string_to_metric_families(scrape)
        for sample in family.samples
        if sample.name == "vllm:lora_requests_info"
    )
    active = {name.strip() for name in labels["running_lora_adapters"].split(",")} - {""}
    waiting = {name.strip() for name in labels["waiting_lora_adapters"].split(",")} - {""}
    if model in active:
        return 1.0
    if len(active | waiting) < int(labels["max_lora"]):
        return 0.8
    return 0.6 if model in waiting else 0.0


def test_a_router_prefers_the_replica_that_has_the_adapter(
    tiny_llama: Path, tiny_llama_shapes: ModelShapes, tmp_path: Path
) -> None:
    folders = {
        name: write_lora(tmp_path / name, tiny_llama_shapes, seed=seed, rank=8)
        for seed, name in enumerate(NAMES)
    }
    with LiveServer(
        tiny_llama, engine=ROOMY, adapters=AdapterConfig(store=tmp_path / "first")
    ) as roomy:
        roomy.upload_all(folders)
        assert affinity(roomy.client, "a") == 0.8
        nbytes = roomy.client.load("a").device_bytes
        wait_until(lambda: affinity(roomy.client, "a") == 1.0, "a is on the device")
        assert affinity(roomy.client, "b") == 0.8
    small = AdapterConfig(store=tmp_path / "second", device_memory=nbytes * 3 // 2)
    with LiveServer(tiny_llama, engine=ROOMY, adapters=small) as full:
        full.upload_all(folders)
        full.client.generate(ask(stack=[("a", 1.0)], max_new_tokens=2))
        wait_until(lambda: affinity(full.client, "a") == 1.0, "a is on the device")
        assert affinity(full.client, "b") == 0.0
        full.client.generate(ask(stack=[("b", 1.0)], max_new_tokens=2))
        wait_until(lambda: affinity(full.client, "b") == 1.0, "b took its place")
        assert affinity(full.client, "a") == 0.0
