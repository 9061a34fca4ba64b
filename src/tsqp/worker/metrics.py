"""What a worker or dealer tells Prometheus, by HTTP on a port of its own: the counters that ``stats`` has, and no more.

They are read when they are asked for, on a thread of the server's: the worker's loop does nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tsqp.errors import ConfigError
from tsqp.transport.urls import parse
from tsqp.wire.messages import StatsResult, Welcome
from tsqp.worker.dispatch import Dispatcher

_COUNTERS = {
    "errors": ("errors", "Requests that were answered with a failure."),
    "refused": ("refused", "What was turned away because others were served first."),
    "received_bytes": ("bytes_received", "Bytes of requests."),
    "sent_bytes": ("bytes_sent", "Bytes of replies."),
    "products": ("products", "Products that were computed."),
    "product_requests": ("product_requests", "Requests that these products answered."),
    "rows": ("rows", "Rows of these products."),
    "compute_seconds": ("compute_s", "Time of products, with copies to the device and back."),
    "copy_seconds": ("copy_s", "Time of these copies."),
}
_GAUGES = {
    "waiting_requests": ("waiting", "Requests that wait to be computed."),
    "waiting_bytes": ("waiting_bytes", "Bytes that these hold."),
    "clients": ("clients", "Clients that are connected."),
    "device_memory_bytes": ("device_memory_bytes", "Memory of the GPU that is taken; of the process, on a CPU."),
    "device_memory_total_bytes": ("device_memory_total_bytes", "Memory of the GPU; of the machine, on a CPU."),
    "uptime_seconds": ("uptime_s", "Time since it was loaded."),
}


class MetricsServer:
    """Prometheus' own small HTTP server. It listens at once, and has something to tell from ``show`` on.

    Args:
        address: ``host:port``.
        on_notice: told in a sentence where others can read what it tells.

    Raises:
        ConfigError: the address is no ``host:port``, or cannot be listened on.
    """

    def __init__(self, address: str, on_notice: Callable[[str], None]) -> None:
        endpoint = parse(address)
        if endpoint.scheme != "tcp":
            raise ConfigError(f"metrics {address!r}: expected HOST:PORT, as in 127.0.0.1:9090.")
        self._registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(endpoint.port, endpoint.ip, self._registry)
        except OSError as error:
            raise ConfigError(
                f"cannot serve metrics on {endpoint}: {error.strerror}. Choose another --metrics (TSQP_METRICS)."
            ) from error
        if not endpoint.stays_on_this_machine:
            on_notice(f"metrics at {endpoint} are open to the network, unencrypted: whoever reaches it can read them.")

    def show(self, dispatcher: Dispatcher) -> None:
        """Tell of a dispatcher from now on."""
        self._registry.register(_Collector(dispatcher))

    def close(self) -> None:
        """Stop listening. May be called twice."""
        with suppress(OSError):
            self._server.shutdown()
            self._server.server_close()
        self._thread.join()


class _Collector(Collector):
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def describe(self) -> Iterator[Metric]:
        """Name nothing beforehand: the device is not asked when this is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._dispatcher.stats()
        yield _info(self._dispatcher.welcome())
        ranks = self._dispatcher.service.ranks
        yield GaugeMetricFamily("tsqp_worker_tensor_parallel", "Processes that compute each product.", value=ranks)
        yield _requests(stats)
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"tsqp_worker_{name}", text, value=getattr(stats, field))
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"tsqp_worker_{name}", text, value=getattr(stats, field))


def _info(welcome: Welcome) -> GaugeMetricFamily:
    labels = ("model", "model_digest", "serves", "device", "dtype", "software")
    family = GaugeMetricFamily("tsqp_worker_info", "Always 1; its labels say what is served.", labels=labels)
    family.add_metric([getattr(welcome, name) for name in labels], 1)
    return family


def _requests(stats: StatsResult) -> CounterMetricFamily:
    family = CounterMetricFamily("tsqp_worker_requests", "Requests by kind.", labels=("kind",))
    for kind, count in stats.requests.items():
        family.add_metric((kind,), count)
    return family
