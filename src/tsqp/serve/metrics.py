"""What ``/metrics`` tells, in Prometheus' text form: counts and times, never a word of a prompt or an answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tsqp import __version__
from tsqp.engine.api import Engine, EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

_GAUGES = {
    "running": "Generations that run.",
    "queued": "Generations that wait.",
    "blocks_free": "Free blocks of the KV cache.",
    "blocks_total": "Blocks of the KV cache.",
    "batch_rows": "Rows of the last step.",
    "pool_held": "Rows of mask products that are ready, over all linears.",
    "pool_wanted": "Rows of mask products that the pool is to hold.",
    "workers": "Workers that were given.",
    "workers_usable": "Workers that are in use now.",
}
_COUNTERS = {
    "steps": "Steps of the engine.",
    "prompt_tokens": "Tokens of prompts that were computed.",
    "completion_tokens": "Tokens that were generated.",
    "reused_tokens": "Tokens of prompts that were found in the prefix cache.",
    "bytes_sent": "Bytes to workers.",
    "bytes_received": "Bytes from workers.",
    "integrity_failures": "How often a worker or dealer gave a wrong product or sent what it must not.",
}


class Metrics:
    """The counters of one server.

    Args:
        engine: asked for its own counts at each reading.
        model: its name in the API.
        level: at which it is continued.
    """

    def __init__(self, engine: Engine, model: str, level: str) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "tsqp_http_requests", "HTTP requests that ended.", ("path", "status"), registry=self._registry
        )
        self.in_flight = Gauge(
            "tsqp_http_generations_in_flight", "HTTP requests for text that run.", registry=self._registry
        )
        self.failed = Counter(
            "tsqp_generations_failed",
            "HTTP requests for text that were queued and ended with an error.",
            ("code",),
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "tsqp_time_to_first_token_seconds",
            "From a request's submission to its first token.",
            buckets=_FIRST_S,
            registry=self._registry,
        )
        self.token_s = Histogram(
            "tsqp_time_per_token_seconds", "Between two tokens.", buckets=_TOKEN_S, registry=self._registry
        )
        info = Gauge(
            "tsqp_server_info",
            "Always 1; its labels say what is served.",
            ("model", "level", "software"),
            registry=self._registry,
        )
        info.labels(model, level, f"tsqp {__version__}").set(1)
        started = time.monotonic()
        uptime_s = Gauge("tsqp_server_uptime_seconds", "Time since it was loaded.", registry=self._registry)
        uptime_s.set_function(lambda: time.monotonic() - started)
        self._registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Promise no names beforehand: the engine is not asked when this is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"tsqp_engine_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"tsqp_engine_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily("tsqp_engine_ready", "1 where requests can be served.", value=int(stats.ready))
        yield _parts(stats)
        yield from _of_workers(stats)


def _parts(stats: EngineStats) -> CounterMetricFamily:
    family = CounterMetricFamily("tsqp_engine_part_seconds", "Time by part.", labels=("part",))
    for part, seconds in stats.seconds.items():
        family.add_metric((part,), seconds)
    return family


def _of_workers(stats: EngineStats) -> Iterator[Metric]:
    used = GaugeMetricFamily("tsqp_engine_worker_in_use", "1 where a worker is in use.", labels=("worker",))
    rows = CounterMetricFamily("tsqp_engine_worker_rows", "Rows of steps by worker.", labels=("worker",))
    for name, is_used, count in stats.each_worker:
        used.add_metric((name,), int(is_used))
        rows.add_metric((name,), count)
    yield used
    yield rows
