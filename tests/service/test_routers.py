"""The gauges that routers read, and how long a rendering is kept."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lorastack.client import AsyncClient, Client
from lorastack.service.watch import routers
from lorastack.service.watch.exposition import MAX_KEPT, OWN_AGE, ROUTERS_AGE, Exposition
from tests.service.fakes import RunningServer

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def router_collector(fake: RunningServer, **options: Any) -> routers.RouterCollector:
    return routers.RouterCollector(
        engine=fake.server._engine,
        pool=fake.server._pool,
        registry=fake.registry,
        model_name="tiny",
        page_size=16,
        device_memory=10_000,
        **options,
    )


def lora_info(fake: RunningServer) -> dict[str, str]:
    """The labels of vllm:lora_requests_info, read now."""
    registry = CollectorRegistry()
    registry.register(router_collector(fake))
    (family,) = (f for f in registry.collect() if f.name == "vllm:lora_requests_info")
    return family.samples[0].labels


def test_state_under_names_of_vllm(fake: RunningServer, client: Client) -> None:
    fake.engine.num_waiting = 0
    reply = client.metrics()
    assert reply.content_type.startswith("text/plain")
    lines = reply.body.decode().splitlines()
    assert 'vllm:num_requests_waiting{model_name="tests/tiny"} 0.0' in lines
    assert 'vllm:num_requests_running{model_name="tests/tiny"} 0.0' in lines
    assert 'vllm:kv_cache_usage_perc{model_name="tests/tiny"} 0.5' in lines
    assert 'vllm:cache_config_info{block_size="16",num_gpu_blocks="6"} 1.0' in lines
    assert any(line.startswith("lorastack_rows{") for line in lines)


def test_openmetrics_and_what_nobody_knows(fake: RunningServer, client: Client) -> None:
    reply = client.metrics(OPENMETRICS)
    assert reply.content_type.startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics_families(reply.body.decode())}
    assert {"vllm:num_requests_waiting", "lorastack_rows"} <= names
    for accept in ("nonsense", "text/plain; version=x", "application/openmetrics-text; version=x"):
        assert b"vllm:num_requests_waiting{" in client.metrics(accept).body

    async def scrape() -> bytes:
        async with AsyncClient(fake.address) as other:
            return bytes((await other.metrics()).body)

    assert b"vllm:lora_requests_info{" in asyncio.run(scrape())


def test_adapters_by_id(fake: RunningServer, client: Client, folders: dict[str, Path]) -> None:
    assert lora_info(fake)["running_lora_adapters"] == ""
    lora = client.upload(folders["lora"], "z-lora").digest
    other = client.upload(folders["other"], "other").digest
    stored = lora_info(fake)
    assert stored["running_lora_adapters"] == stored["waiting_lora_adapters"] == ""
    mean = (client.get_adapter("z-lora").size_bytes + client.get_adapter("other").size_bytes) / 2
    assert stored["max_lora"] == str(max(int(10_000 / mean), 1))
    client.upload(folders["lora"], "a-copy")
    fake.pool.put(lora, 2000)
    fake.pool.waited_for = frozenset({lora, other})
    assert lora_info(fake) == {
        "max_lora": "10",  # two ids share 2,000 bytes
        "running_lora_adapters": "a-copy,z-lora",
        "waiting_lora_adapters": "other",
    }
    client.delete_adapter("a-copy")
    assert lora_info(fake)["running_lora_adapters"] == "z-lora"
    fake.pool.put("sha256:of-an-older-revision", 2000)
    assert lora_info(fake)["running_lora_adapters"] == "z-lora"


def test_lists_are_read_anew_after_a_moment(
    fake: RunningServer, client: Client, folders: dict[str, Path]
) -> None:
    now = [100.0]
    collector = router_collector(fake, clock=lambda: now[0])

    def read() -> tuple[float, str]:
        (family,) = (f for f in collector.collect() if f.name == "vllm:lora_requests_info")
        (sample,) = family.samples
        return sample.value, sample.labels["running_lora_adapters"]

    assert read() == (100.0, "")
    fake.pool.put(client.upload(folders["lora"], "lora").digest)
    now[0] += routers.ADAPTERS_AGE / 2
    assert read() == (100.0, "")  # the value says of when the lists are
    now[0] = 100.0 + routers.ADAPTERS_AGE
    assert read() == (now[0], "lora")
    fake.pool.put(client.upload(folders["other"], "other").digest)
    now[0] = 50.0  # the clock was set back
    assert read() == (50.0, "lora,other")


def test_a_list_is_bounded(
    fake: RunningServer, client: Client, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "MAX_NAMES", 2)
    for name in ("lora", "other", "bundle"):
        fake.pool.put(client.upload(folders[name], name).digest)
    assert lora_info(fake)["running_lora_adapters"] == "bundle,other"  # the latest used


class Counting(Collector):
    """A gauge of how often it was read."""

    def __init__(self, name: str) -> None:
        self.name, self.num_reads = name, 0

    def collect(self) -> list[GaugeMetricFamily]:
        self.num_reads += 1
        return [GaugeMetricFamily(self.name, "Reads.", self.num_reads)]


def test_renderings_are_kept_by_format() -> None:
    own, fast, now = Counting("own"), Counting("fast"), [0.0]
    registry = CollectorRegistry()
    registry.register(own)
    exposition = Exposition(registry, fast, lambda: now[0])

    def read(accept: str = "") -> dict[str, float]:
        text = exposition.render(accept)[1].decode()
        return {f.name: f.samples[0].value for f in text_string_to_metric_families(text)}

    assert read() == read() == {"own": 1, "fast": 1}
    assert read(OPENMETRICS) == {"own": 2, "fast": 2}
    now[0] = ROUTERS_AGE
    assert read() == {"own": 1, "fast": 3}
    now[0] = OWN_AGE
    assert read() == {"own": 3, "fast": 4}
    for number in range(3 * MAX_KEPT):
        exposition.render(f"application/openmetrics-text; version=1.0.{number}")
    assert len(exposition._own._kept) <= MAX_KEPT
