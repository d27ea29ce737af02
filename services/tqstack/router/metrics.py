"""`/metrics` in Prometheus form, under OpenTelemetry's GenAI names where those exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from tqstack.router.backends.backend import Backend
from tqstack.router.clients import Clients
from tqstack.router.journal import Record
from tqstack.router.slots import Slots

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_PER_TOKEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
_RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.5, 2)
_STATES = ("up", "sick", "loading", "down", "off")


class Metrics:
    """Counts what the journal tells it, and asks the backends how they are when it is scraped."""

    def __init__(self, backends: Mapping[str, Backend], slots: Slots, clients: Clients):
        self._registry = CollectorRegistry()
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._requests = Counter(
            "tqstack_router_requests",
            "Requests that ended, by the backend that answered, why it, and how they ended",
            ("path", "backend", "reason", "outcome"),
            registry=self._registry,
        )
        self._fallbacks = Counter(
            "tqstack_router_fallbacks",
            "Answers by another backend than the one that should have given them",
            ("from", "to"),
            registry=self._registry,
        )
        self._estimates = self._histogram(
            "tqstack_router_estimate_ratio", "Estimated over true prompt tokens", _RATIOS
        )
        self._duration = self._histogram(
            "gen_ai_server_request_duration_seconds", "Whole requests", _SECONDS
        )
        self._first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds", "Arrival to first byte", _SECONDS
        )
        self._per_token = self._histogram(
            "gen_ai_server_time_per_output_token_seconds", "Between tokens of a stream", _PER_TOKEN
        )
        self._usage = self._histogram(
            "gen_ai_client_token_usage", "Tokens of a request", _TOKENS, "gen_ai_token_type"
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(_BackendCollector(backends))
        self._registry.register(_ClientCollector(clients))
        waiting = Gauge(
            "tqstack_router_waiting",
            "Requests that wait because all backends are full",
            registry=self._registry,
        )
        waiting.set_function(lambda: slots.waiting)

    def _histogram(self, name: str, what: str, buckets: tuple, *labels: str) -> Histogram:
        return Histogram(
            name,
            what,
            ("gen_ai_provider_name", *labels),
            buckets=buckets,
            registry=self._registry,
        )

    def observe(self, record: Record) -> None:
        """Takes in a request that has ended."""
        chosen, backend, child = record.chosen, record.backend or "", self._child
        reason = chosen.reason if chosen else ""
        child(self._requests, record.path, backend, reason, record.outcome).inc()
        if chosen is None or record.outcome != "ok":
            return
        if chosen.fallback_from:
            child(self._fallbacks, chosen.fallback_from, backend).inc()
        if record.seconds is not None:
            child(self._duration, backend).observe(record.seconds)
        if record.first_token is not None and record.stream:
            child(self._first_token, backend).observe(record.first_token)
        if record.seconds_per_token is not None:
            child(self._per_token, backend).observe(record.seconds_per_token)
        if record.prompt_tokens:
            child(self._usage, backend, "input").observe(record.prompt_tokens)
            child(self._estimates, backend).observe(chosen.tokens / record.prompt_tokens)
        if record.output_tokens:
            child(self._usage, backend, "output").observe(record.output_tokens)

    def _child(self, metric: Counter | Histogram, *labels: str) -> Any:
        """The metric for these labels, remembered: the library's own look-up takes a lock."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = metric.labels(*labels)
        return child

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _BackendCollector:
    """States and loads, read at the moment of the scrape."""

    def __init__(self, backends: Mapping[str, Backend]):
        self._backends = backends

    def collect(self) -> Iterable[GaugeMetricFamily]:
        states = GaugeMetricFamily(
            "tqstack_router_backend_state", "1 for the state it is in", labels=("backend", "state")
        )
        running = GaugeMetricFamily(
            "tqstack_router_backend_running", "Requests under way", labels=("backend",)
        )
        for backend in self._backends.values():
            for state in _STATES:
                states.add_metric((backend.name, state), float(backend.view().state == state))
            running.add_metric((backend.name,), backend.load.running)
        return (states, running)


class _ClientCollector:
    """What each key was used for, read at the moment of the scrape."""

    def __init__(self, clients: Clients):
        self._clients = clients

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily(
            "tqstack_router_client_running", "Requests under way, by key", labels=("client",)
        )
        requests = CounterMetricFamily(
            "tqstack_router_client_requests",
            "Requests by key, those that its limits refused too",
            labels=("client", "outcome"),
        )
        tokens = CounterMetricFamily(
            "tqstack_router_client_tokens", "Tokens by key", labels=("client", "type")
        )
        for name, use in self._clients.report().items():
            running.add_metric((name,), use["running"])
            requests.add_metric((name, "taken"), use["requests"])
            requests.add_metric((name, "refused"), use["refused"])
            for kind in ("prompt", "cached", "output"):
                tokens.add_metric((name, kind), use[f"{kind}_tokens"])
        return running, requests, tokens
