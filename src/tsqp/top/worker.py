"""Reads a worker or dealer, by ``hello`` and ``stats`` of its own protocol."""

from __future__ import annotations

from tsqp.config import EnclaveConfig
from tsqp.enclave.session import Role, Session
from tsqp.errors import TransportTimeoutError, printable
from tsqp.top.reading import Reading
from tsqp.transport.client import open_client
from tsqp.transport.keys import load_public, load_secret
from tsqp.transport.urls import parse
from tsqp.wire import messages
from tsqp.wire.messages import StatsResult, Welcome

# What only says that somebody watches, or has come.
_NO_WORK = ("hello", "stats", "state")


class WorkerSource:
    """A worker or dealer.

    Args:
        address: where it is.
        config: its key, this process's own if it lets only some in, and how long to wait for an answer.

    Raises:
        ConfigError, SetupError: address or key cannot be used.
    """

    def __init__(self, address: str, config: EnclaveConfig) -> None:
        self._endpoint = parse(address)
        self._key = load_public(config.worker_key) if config.worker_key is not None else None
        self._own = load_secret(config.own_key) if config.own_key is not None else None
        self._config = config
        self._session: Session | None = None
        self._welcome: Welcome | None = None

    @property
    def url(self) -> str:
        """See ``Source.url``."""
        return str(self._endpoint)

    def read(self) -> Reading:
        """See ``Source.read``. After an error a new link is opened."""
        try:
            session, welcome = self._met()
            request = session.submit(lambda number: messages.Stats(id=number))
            try:
                stats, _ = session.result(request, StatsResult, self._config.connect_timeout_s)
            except TransportTimeoutError as error:
                raise TransportTimeoutError(
                    f"the {_role(welcome)} at {self.url} has not answered for {self._config.connect_timeout_s:g} s: it "
                    "hangs, or computes something long."
                ) from error
        except BaseException:
            self.close()
            raise
        return _reading(welcome, stats)

    def _met(self) -> tuple[Session, Welcome]:
        if self._session is None or self._welcome is None:
            timeout_s = self._config.connect_timeout_s
            link = open_client(self._endpoint, self._config.max_message_bytes, self._key, self._own)
            self._session = Session(link, timeout_s)
            self._welcome = self._session.hello(timeout_s)
        return self._session, self._welcome

    def close(self) -> None:
        """See ``Source.close``."""
        if self._session is not None:
            self._session.close()
        self._session = self._welcome = None


def _role(welcome: Welcome) -> Role:
    return "dealer" if welcome.serves == "masks" else "worker"


def _reading(welcome: Welcome, stats: StatsResult) -> Reading:
    return Reading(
        kind=_role(welcome),
        software=printable(welcome.software),
        model=printable(welcome.model),
        serves=welcome.serves,
        device=printable(welcome.device),
        dtype=welcome.dtype,
        uptime_s=stats.uptime_s,
        requests={printable(kind): count for kind, count in stats.requests.items() if kind not in _NO_WORK},
        counters={
            "rows": stats.rows,
            "bytes_in": stats.bytes_received,
            "bytes_out": stats.bytes_sent,
            "products": stats.products,
            "product_requests": stats.product_requests,
        },
        parts={"computing": max(0.0, stats.compute_s - stats.copy_s), "copying": stats.copy_s},
        clients=stats.clients,
        waiting=stats.waiting,
        waiting_bytes=stats.waiting_bytes,
        memory_bytes=stats.device_memory_bytes,
        memory_total_bytes=stats.device_memory_total_bytes,
        errors=stats.errors,
        refused=stats.refused,
    )
