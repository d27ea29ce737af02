"""`/metrics` of the sidecar in Prometheus form: what the engine holds now, and has done so far."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from tqstack.engine.engine import Engine
from tqstack.ranks.group import Group


class RankCollector:
    """What each rank of a divided model last said of itself."""

    def __init__(self, group: Group):
        self._group = group

    def collect(self) -> Iterable[Metric]:
        gauges = {
            "silent_seconds": "Since the rank was heard of",
            "bytes": "Held by the rank's device",
            "step": "Orders that the rank has carried out",
        }
        each = self._group.status()["each"]
        for name, what in gauges.items():
            gauge = GaugeMetricFamily(f"tqstack_sidecar_rank_{name}", what, labels=["rank", "host"])
            for one in each:
                if name in one:
                    gauge.add_metric([str(one["rank"]), one["host"]], one[name])
            yield gauge


class EngineCollector:
    """Reads the engine whenever it is scraped."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        status = self._engine.status()
        requests, cache = status["requests"], status["cache"]
        gauges = {
            "requests_running": ("Sequences in the batch", requests["running"]),
            "requests_waiting": ("Requests not yet taken in", requests["waiting"]),
            "context_tokens": ("Tokens in all contexts", sum(requests["context_tokens"])),
            "cache_bytes": ("Keys and values, as really held", cache["bytes"]),
            "cache_bytes_fp16": ("The same in 16 bits", cache["bytes_fp16"]),
        }
        if memory := status.get("memory"):
            gauges["memory_budget_bytes"] = ("All that may be held", memory["budget"])
            gauges["memory_held_bytes"] = ("What is held", memory["held"])
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"tqstack_sidecar_{name}", what, value=value)
        for name, value in status["totals"].items():
            what = f"{name.replace('_', ' ').capitalize()} since the start"
            yield CounterMetricFamily(f"tqstack_sidecar_{name}", what, value=value)
        for name in ("draft_tokens", "draft_tokens_accepted", "verify_steps"):
            value = status.get("speculation", {}).get(name, 0)
            what = f"{name.replace('_', ' ').capitalize()} of speculative decoding"
            yield CounterMetricFamily(f"tqstack_sidecar_{name}", what, value=value)
        if prefixes := status.get("prefixes"):
            missed = CounterMetricFamily(
                "tqstack_sidecar_prefix_misses",
                "Prompts that were read anew, by why",
                labels=["why"],
            )
            for why, count in prefixes["misses"].items():
                missed.add_metric([why], count)
            yield missed


class Metrics:
    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine, group: Group | None):
        self._registry = CollectorRegistry()
        collectors = [EngineCollector(engine), *([RankCollector(group)] if group else [])]
        for collector in collectors:
            self._registry.register(collector)  # pyright: ignore[reportArgumentType]

    def render(self) -> bytes:
        return generate_latest(self._registry)
