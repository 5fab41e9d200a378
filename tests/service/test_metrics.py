"""What is exported, that the documentation names it, and that labels of adapters go with them."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lorastack.client import Client
from lorastack.errors import InvalidArgumentError, NotFoundError
from lorastack.request import SpeculationStats
from lorastack.service.watch.metrics import MAX_HEADS, HeadsCounts
from lorastack.v1 import generation_pb2 as pb
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"\| `((?:lorastack_|process_|vllm:)\w+)` \| (\w+) \| ([^|]*)\|")

Folders = dict[str, Path]
Samples = dict[tuple[str, ...], float]


def samples(registry: CollectorRegistry) -> Samples:
    """(name, label values in the order of their names) -> value."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def exported(text: str) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(name, type, label names) of everything that has a sample in a scrape."""
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                yield name, family.type, frozenset(sample.labels) - {"le"}


def generate(client: Client, **fields: object) -> None:
    client.generate(pb.GenerateRequest(prompt="a", stop=pb.StopParams(max_new_tokens=5), **fields))


@pytest.fixture
def busy(fake: RunningServer, client: Client, folders: Folders) -> dict[str, str]:
    """A server that has done a bit of everything; digests by id."""
    digests = {name: client.upload(folders[name], name).digest for name in ("lora", "heads")}
    for name in digests:
        client.load(name)
    generate(client, lora_id="lora", medusa_id="heads")
    generate(client)
    fake.engine.heads_failures[digests["heads"]] = 2
    return digests


def test_the_documentation_names_what_is_exported(client: Client, busy: dict[str, str]) -> None:
    documented = {
        (name, kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in ROW.findall(DOCUMENT.read_text())
    }
    assert documented == set(exported(client.metrics().body.decode()))


def test_requests_and_tokens(fake: RunningServer, client: Client, busy: dict[str, str]) -> None:
    with pytest.raises(NotFoundError):
        generate(client, lora_id="nobody")
    values = samples(fake.server.metrics)
    assert values["lorastack_requests_total", "OK", "Generate"] == 2
    assert values["lorastack_requests_total", "NOT_FOUND", "Generate"] == 1
    assert values["lorastack_requests_total", "OK", "UploadAdapter"] == 2
    assert values["lorastack_tokens_total", "generated"] == 10
    num_prompt = len(fake.engine.tokenizer.encode("a"))
    assert values["lorastack_tokens_total", "prompt"] == 2 * num_prompt
    assert values["lorastack_time_to_first_token_seconds_count",] == 2
    assert values["lorastack_adapter_wait_seconds_count",] == 1  # the other had no LoRA
    assert values["lorastack_adapter_lookups_total", "hit"] == 1


def test_rows_and_tiers(fake: RunningServer, client: Client, busy: dict[str, str]) -> None:
    fake.engine.hold(1)
    stream = client.stream(pb.GenerateRequest(prompt="a", lora_id="lora"))
    next(stream)
    fake.host.copies[busy["lora"]] = 700
    fake.pool.put(busy["lora"], 500, in_use=3, pinned=True)
    fake.pool.counts.update(num_waiting=4, host_hits=5, disk_loads=6, load_seconds=7.5, evictions=8)
    values = samples(fake.server.metrics)
    assert values["lorastack_rows", "running"] == 1
    assert values["lorastack_adapters", "disk"] == 2
    assert values["lorastack_adapter_bytes", "host"] == 700
    assert values["lorastack_adapter_bytes", "device"] == 2500
    assert values["lorastack_adapter_budget_bytes", "device"] == 2 << 30
    assert values["lorastack_adapter_device_bytes", busy["lora"]] == 500
    assert values["lorastack_adapter_in_flight", busy["lora"]] == 3
    assert values["lorastack_adapter_pinned", busy["lora"]] == 1
    assert values["lorastack_adapter_sets_waiting",] == 4
    assert values["lorastack_adapter_loads_total", "host"] == 5
    assert values["lorastack_adapter_loads_total", "disk"] == 6
    assert values["lorastack_adapter_load_seconds_total",] == 7.5
    assert values["lorastack_adapter_evictions_total",] == 8
    assert values["lorastack_draft_tokens_total", "accepted", "heads"] == 2 * 3
    assert values["lorastack_draft_tokens_total", "rejected", "prompt_lookup"] == 2 * 4
    assert values["lorastack_drafted_tokens_per_step_sum",] == pytest.approx(2 * 11 / 5)
    assert values["lorastack_tokens_per_step_sum",] == pytest.approx(2 * (1 + 3 / 5))
    fake.engine.go_on()
    list(stream)


def test_an_alias_is_in_no_tier(fake: RunningServer, client: Client, folders: Folders) -> None:
    client.upload(folders["lora"], "lora")
    before = samples(fake.server.metrics)
    client.alias("x", [("lora", 1.0)])
    after = samples(fake.server.metrics)
    for name in ("lorastack_adapters", "lorastack_adapter_bytes"):
        assert after[name, "disk"] == before[name, "disk"] > 0


def test_labels_of_an_adapter_end_with_its_stay(
    fake: RunningServer, client: Client, busy: dict[str, str]
) -> None:
    heads = busy["heads"]
    values = samples(fake.server.metrics)
    assert values["lorastack_heads_steps_total", heads] == 5
    assert values["lorastack_heads_accepted_tokens_total", heads, "0"] == 2
    assert values["lorastack_heads_accepted_tokens_total", heads, "1"] == 1
    assert values["lorastack_heads_drafted_tokens_total", heads] == 7
    assert values["lorastack_heads_failures_total", heads] == 2
    generate(client, lora_id="lora", medusa_id="heads")
    assert samples(fake.server.metrics)["lorastack_heads_steps_total", heads] == 10
    fake.pool.drop(heads)
    assert not [key for key in samples(fake.server.metrics) if heads in key]
    client.load("heads")
    assert ("lorastack_heads_steps_total", heads) not in samples(fake.server.metrics)


def test_counts_of_heads_nobody_scrapes_are_bounded() -> None:
    counts = HeadsCounts()
    stats = SpeculationStats(steps=1)
    for number in range(MAX_HEADS + 5):
        counts.add(str(number), stats)
    kept = counts.keep_only([str(number) for number in range(MAX_HEADS + 5)])
    assert list(kept) == [str(number) for number in range(5, MAX_HEADS + 5)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_the_port(start_fake: StartFake) -> None:
    port = free_port()
    server = start_fake(metrics_port=port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        assert b"lorastack_rows" in reply.read()
    with pytest.raises(InvalidArgumentError, match="--metrics-port"):
        start_fake(metrics_port=port)
    server.stop()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
