"""What Prometheus may scrape. docs/metrics.md names every metric; a test holds the two together.

The service counts calls and tokens as they pass; the state of engine, pool, host cache and store is
read when somebody scrapes. Adapters have labels only while they are on the device.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter as Counts
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from lorastack.adapters.memory.host import HostCache
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.stats import PoolStats
from lorastack.adapters.store.registry import Registry
from lorastack.config import AdapterConfig
from lorastack.engine.engine import Engine
from lorastack.layout import AdapterKind
from lorastack.request import Final, Request, SpeculationStats, TokenSource

# Seconds: from a warm step of a small model to the wait for a cold adapter behind others.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
LAG_INTERVAL = 0.25  # seconds between two measurements
DRAFTED_BUCKETS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
TOKENS_BUCKETS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 10.0)
MAX_HEADS = 1024  # digests of heads that are counted
PREFIX = "lorastack_"


class RequestMetrics:
    """Counts of what the service has seen. Any thread may call anything."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.heads = HeadsCounts()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            f"{PREFIX}requests", "Calls by RPC and status.", ["rpc", "code"], registry=registry
        )
        self._tokens = Counter(f"{PREFIX}tokens", "Tokens by kind.", ["kind"], registry=registry)
        self._lookups = Counter(
            f"{PREFIX}adapter_lookups",
            "Ended requests with adapters, by whether they had to wait for one.",
            ["result"],
            registry=registry,
        )
        self._drafts = Counter(
            f"{PREFIX}draft_tokens",
            "Drafted tokens by source and by whether they became output.",
            ["source", "result"],
            registry=registry,
        )

        def histogram(name: str, about: str, buckets: Sequence[float] = BUCKETS) -> Histogram:
            return Histogram(f"{PREFIX}{name}", about, buckets=buckets, registry=registry)

        self._drafted_a_step = histogram(
            "drafted_tokens_per_step",
            "Mean number of tokens drafted in a decode step of a request.",
            DRAFTED_BUCKETS,
        )
        self._tokens_a_step = histogram(
            "tokens_per_step",
            "Mean number of tokens that a decode step of a request gave.",
            TOKENS_BUCKETS,
        )
        self._first_token = histogram(
            "time_to_first_token_seconds", "Seconds from submission to the first token."
        )
        self._token_interval = histogram(
            "time_per_output_token_seconds",
            "Mean seconds between two tokens of a request.",
            TOKEN_BUCKETS,
        )
        self._queue = histogram("queue_seconds", "Seconds from submission to the row's first step.")
        self._total = histogram(
            "request_seconds",
            "Seconds from submission to the end of a request.",
            (*BUCKETS, 120.0, 300.0, 600.0),
        )
        self._loop_lag = histogram(
            "event_loop_lag_seconds",
            "Seconds by which the event loop gets to a timer too late.",
            TOKEN_BUCKETS,
        )
        self._adapter_wait = histogram(
            "adapter_wait_seconds",
            "Seconds that a request with LoRAs waited for them to be on the device.",
        )

    def call_ended(self, rpc: str, code: grpc.StatusCode) -> None:
        """Counts an ended call of any RPC, refused ones too."""
        self._requests.labels(rpc, code.name).inc()

    def generated(self, num_tokens: int) -> None:
        """Counts tokens that were handed to a caller."""
        self._tokens.labels("generated").inc(num_tokens)

    def row_ended(self, request: Request, final: Final) -> None:
        """Counts a request that ended with a finish reason."""
        self._tokens.labels("prompt").inc(final.prompt_tokens)
        self._tokens.labels("cached_prompt").inc(final.cached_prompt_tokens)
        timings, num_tokens = final.timings, final.generated_tokens
        self._queue.observe(timings.queue)
        self._total.observe(timings.total)
        if num_tokens:
            self._first_token.observe(timings.time_to_first_token)
        if num_tokens > 1:
            decoding = timings.total - timings.time_to_first_token
            self._token_interval.observe(decoding / (num_tokens - 1))
        if request.loras:
            self._adapter_wait.observe(timings.adapter_wait)
            self._lookups.labels("miss" if timings.adapter_wait else "hit").inc()
        if request.heads is not None:
            self.heads.add(request.heads.digest, final.speculation)
        if request.speculation.enabled:
            self._speculated(final.speculation)

    async def watch_loop(self) -> None:
        """Measures how late its event loop gets to a timer, until it is cancelled."""
        while True:
            due = time.monotonic() + LAG_INTERVAL
            await asyncio.sleep(LAG_INTERVAL)
            self._loop_lag.observe(max(time.monotonic() - due, 0.0))

    def _speculated(self, stats: SpeculationStats) -> None:
        for source, drafted in stats.drafted.items():
            accepted = stats.accepted[source]
            self._drafts.labels(source.value, "accepted").inc(accepted)
            self._drafts.labels(source.value, "rejected").inc(drafted - accepted)
        if stats.steps:
            self._drafted_a_step.observe(stats.drafted.total() / stats.steps)
            self._tokens_a_step.observe(1 + stats.accepted.total() / stats.steps)


@dataclass(slots=True)
class HeadsCount:
    """What the drafts of one digest's heads gave."""

    steps: int = 0
    drafted: int = 0
    accepted_by_head: Counts[int] = field(default_factory=Counts)  # head -> tokens


class HeadsCounts:
    """Acceptance by heads digest, of heads that are on the device or were there lately."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, HeadsCount] = {}

    def add(self, digest: str, stats: SpeculationStats) -> None:
        """Adds what one request's drafts gave."""
        with self._lock:
            if digest not in self._counts and len(self._counts) == MAX_HEADS:
                del self._counts[next(iter(self._counts))]  # nobody scrapes: forget the oldest
            count = self._counts.setdefault(digest, HeadsCount())
            count.steps += stats.steps
            count.drafted += stats.drafted[TokenSource.HEADS]
            count.accepted_by_head.update(dict(enumerate(stats.accepted_by_head)))

    def keep_only(self, digests: Collection[str]) -> dict[str, HeadsCount]:
        """Forgets all other heads and returns copies of these counts."""
        with self._lock:
            self._counts = {d: count for d, count in self._counts.items() if d in digests}
            return {
                digest: replace(count, accepted_by_head=count.accepted_by_head.copy())
                for digest, count in self._counts.items()
            }


class StateCollector(Collector):
    """The state of what runs, read at each scrape."""

    def __init__(
        self,
        *,
        engine: Engine,
        pool: DevicePool,
        host: HostCache,
        registry: Registry,
        heads: HeadsCounts,
        config: AdapterConfig,
        info: Mapping[str, Mapping[str, str]],
    ) -> None:
        """info: labels that do not change while the process runs, by metric."""
        self._info = info
        self._engine = engine
        self._pool = pool
        self._host = host
        self._registry = registry
        self._heads = heads
        self._config = config

    def collect(self) -> Iterator[Metric]:
        """One family a metric. Called in the metrics server's thread."""
        stats = self._pool.stats()
        for name, labels in self._info.items():
            yield InfoMetricFamily(f"{PREFIX}{name}", "What this server runs.", dict(labels))
        yield from self._rows(stats)
        yield from self._pages()
        yield from self._tiers(stats)
        yield from self._paging(stats)
        yield from self._residents(stats)
        yield from self._acceptance(stats)

    def _rows(self, stats: PoolStats) -> Iterator[Metric]:
        num_waiting = self._engine.num_waiting
        rows = {"waiting": num_waiting, "running": max(self._engine.num_rows - num_waiting, 0)}
        yield _gauge("rows", "Requests in the engine.", "state", rows)
        about = "Requests in the engine whose readers do not read."
        yield _gauge("parked_rows", about, value=self._engine.num_parked)
        about = "Rows that gave their pages to others and run again."
        yield _counter("preemptions", about, value=self._engine.num_preemptions)
        about = "Sets of LoRAs that rows wait for."
        yield _gauge("adapter_sets_waiting", about, value=stats.num_waiting)

    def _pages(self) -> Iterator[Metric]:
        pages = self._engine.num_pages
        yield _gauge("kv_pages", "Pages of the KV cache.", "state", pages)

    def _tiers(self, stats: PoolStats) -> Iterator[Metric]:
        stored = self._registry.list()
        tiers = {
            # An alias is a name, and in no other tier.
            "disk": {
                record.digest: record.size_bytes
                for record in stored
                if record.manifest.facts.kind is not AdapterKind.ALIAS
            },
            "host": self._host.snapshot(),
            "device": {adapter.digest: adapter.nbytes for adapter in stats.adapters},
        }
        counts = {tier: len(sizes) for tier, sizes in tiers.items()}
        nbytes = {tier: sum(sizes.values()) for tier, sizes in tiers.items()}
        budgets = {"host": self._config.host_memory, "device": self._config.device_memory}
        yield _gauge("adapters", "Adapters in a tier.", "tier", counts)
        yield _gauge("adapter_bytes", "Bytes of the adapters in a tier.", "tier", nbytes)
        yield _gauge(
            "adapter_budget_bytes", "Bytes that the adapters in a tier may take.", "tier", budgets
        )
        about = "Bytes of unfinished uploads."
        yield _gauge("staging_bytes", about, value=self._registry.staging_bytes())

    def _paging(self, stats: PoolStats) -> Iterator[Metric]:
        loads = {"host": stats.host_hits, "disk": stats.disk_loads}
        yield _counter(
            "adapter_loads", "Loads of adapters by where their bytes were.", "source", loads
        )
        about = "Seconds that loads of adapters took."
        yield _counter("adapter_load_seconds", about, value=stats.load_seconds)
        about = "Adapters that made room for others on the device."
        yield _counter("adapter_evictions", about, value=stats.evictions)

    def _residents(self, stats: PoolStats) -> Iterator[Metric]:
        nbytes = {adapter.digest: adapter.nbytes for adapter in stats.adapters}
        in_use = {adapter.digest: adapter.in_use for adapter in stats.adapters}
        pinned = {adapter.digest: adapter.pinned for adapter in stats.adapters}
        yield _gauge(
            "adapter_device_bytes", "Bytes of one adapter on the device.", "digest", nbytes
        )
        yield _gauge(
            "adapter_in_flight", "Rows of this step that use the adapter.", "digest", in_use
        )
        yield _gauge(
            "adapter_pinned", "1 if LoadAdapter pinned the adapter, else 0.", "digest", pinned
        )

    def _acceptance(self, stats: PoolStats) -> Iterator[Metric]:
        on_device = {adapter.digest for adapter in stats.adapters}
        counts = self._heads.keep_only(on_device)
        steps = {digest: count.steps for digest, count in counts.items()}
        drafted = {digest: count.drafted for digest, count in counts.items()}
        yield _counter("heads_steps", "Decode steps of rows with these heads.", "digest", steps)
        yield _counter(
            "heads_drafted_tokens", "Tokens that these heads proposed.", "digest", drafted
        )
        accepted = CounterMetricFamily(
            f"{PREFIX}heads_accepted_tokens",
            "Proposals of these heads that became output, by head.",
            labels=["digest", "head"],
        )
        for digest, count in counts.items():
            for head, tokens in count.accepted_by_head.items():
                accepted.add_metric([digest, str(head)], tokens)
        yield accepted
        failures = {d: n for d, n in self._engine.heads_failures.items() if d in on_device}
        about = "Steps in which these heads gave no numbers."
        yield _counter("heads_failures", about, "digest", failures)


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    about: str,
    label: str = "",
    values: Mapping[str, float] | None = None,
    value: float | None = None,
) -> Metric:
    """values: by the label's value; or one value, without a label."""
    family = kind(f"{PREFIX}{name}", about, value, [label] if label else None)
    for key, number in (values or {}).items():
        family.add_metric([key], number)
    return family


_gauge = partial(_family, GaugeMetricFamily)
_counter = partial(_family, CounterMetricFamily)  # Prometheus adds _total to the name
