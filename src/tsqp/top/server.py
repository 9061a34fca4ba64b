"""Reads a ``tsqp serve``, by its ``/metrics`` and ``/readyz``."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import replace
from urllib.parse import SplitResult, urlsplit

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tsqp.errors import ConfigError, PeerKeyError, ProtocolError, TransportError, printable
from tsqp.top.reading import BESIDE, Reading
from tsqp.transport.urls import Endpoint

_MAX_BYTES = 1 << 20
_METRICS, _READY = "/metrics", "/readyz"
_READY_VALUE = "tsqp_engine_ready"
_API = "/v1/"
_GENERATING = ("/v1/completions", "/v1/chat/completions")
_FAILED = 400
# Parts of what the enclave does in a step; what they leave of it is all the rest.
_OF_ENCLAVE = ("attention", "quantise", "mask", "check", "ahead", "mask_wait")

Samples = Mapping[str, Mapping[tuple[str, ...], float]]


class ServerSource:
    """A server.

    Args:
        url: ``http://HOST:PORT`` or ``https://HOST:PORT``; a path such as ``/v1`` is left out.
        key: an API key; None asks without one.
        context: for TLS; None takes certificates that this machine trusts.
        timeout_s: for each answer.

    Raises:
        ConfigError: no such address, or the key would travel in clear.
    """

    def __init__(self, url: str, key: str | None, context: ssl.SSLContext | None, timeout_s: float) -> None:
        place = _place(url)
        self._host, self._port = place.hostname or "", place.port
        self.url = f"{place.scheme}://{place.netloc}"
        self._tls = place.scheme == "https"
        if key is not None and not self._tls and not Endpoint("tcp", host=self._host).stays_on_this_machine:
            raise ConfigError(f"the API key would travel to {self.url} unencrypted: use https, or ask on that machine.")
        self._key, self._timeout_s = key, timeout_s
        self._context = context or ssl.create_default_context()

    def read(self) -> Reading:
        """See ``Source.read``."""
        found = reading_of(self._get(_METRICS), self.url)
        return found if found.ready else replace(found, reason=self._reason())

    def close(self) -> None:
        """See ``Source.close``: each answer has a link of its own."""

    def _reason(self) -> str:
        """Return why the server is not ready; it may be by the time it is asked."""
        with contextlib.suppress(msgspec.MsgspecError):
            return printable(str(msgspec.json.decode(self._get(_READY, (503,)), type=dict).get("reason", "")))
        return ""

    def _get(self, path: str, also: tuple[int, ...] = ()) -> bytes:
        headers = {"authorization": f"Bearer {self._key}"} if self._key is not None else {}
        with self._connected() as connection:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            body = answer.read(_MAX_BYTES + 1)
        if answer.status in (401, 403):
            raise ConfigError(
                f"{self.url} tells {path} on its own machine only, or to who has an API key: give --api-key-file "
                f"(TSQP_API_KEY). HTTP {answer.status}."
            )
        if answer.status not in (http.client.OK, *also):
            raise ConfigError(f"{self.url}{path}: HTTP {answer.status}; expected the address of a 'tsqp serve'.")
        if len(body) > _MAX_BYTES:
            raise ProtocolError(f"{self.url}{path}: more than {_MAX_BYTES} bytes.")
        return body

    @contextlib.contextmanager
    def _connected(self) -> Iterator[http.client.HTTPConnection]:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=self._context)
            if self._tls
            else http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        )
        try:
            yield connection
        except ssl.SSLCertVerificationError as error:
            raise PeerKeyError(
                f"the certificate of {self.url} is none that is trusted here ({error.verify_message}): give --ca FILE, "
                "or --policy FILE for an attested server."
            ) from error
        except ssl.SSLError as error:
            raise TransportError(f"{self.url} does not speak TLS: {error.reason or error}.") from error
        except socket.gaierror as error:
            raise ConfigError(f"{printable(self._host)} cannot be resolved: {error.strerror}.") from error
        except (OSError, http.client.HTTPException) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise TransportError(f"no server answers at {self.url}: {reason}. Is 'tsqp serve' running?") from error
        finally:
            connection.close()


def _place(url: str) -> SplitResult:
    try:
        place = urlsplit(url)
        known = place.scheme in ("http", "https") and place.hostname and not place.username and place.port != 0
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"{printable(url)}: expected http://HOST:PORT or https://HOST:PORT.")
    return place


def reading_of(text: bytes, url: str) -> Reading:
    """Read what ``/metrics`` says.

    Raises:
        ProtocolError: it is not Prometheus' text form, or not as a server of ours has it.
        ConfigError: it is somebody else's.
    """
    samples: dict[str, dict[tuple[str, ...], float]] = {}
    try:
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                labels = tuple(value for _, value in sorted(sample.labels.items()))
                samples.setdefault(sample.name, {})[labels] = _finite(sample.value)
        if _READY_VALUE in samples:
            return _reading(samples)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ProtocolError(f"{url}{_METRICS} is not what a server tells in Prometheus' text form.") from error
    raise ConfigError(f"{url}{_METRICS} is not that of a 'tsqp serve'.")


def _finite(value: float) -> float:
    if not 0 <= value < 1 << 62:
        raise ValueError
    return value


def _one(samples: Samples, name: str) -> float:
    return next(iter(samples.get(name, {}).values()), 0.0)


def _reading(samples: Samples) -> Reading:
    """Return what samples say; labels are in the order of their names."""

    def count(name: str) -> int:
        return int(_one(samples, f"tsqp_engine_{name}"))

    asked = samples.get("tsqp_http_requests_total", {})
    requests: dict[str, int] = {}
    for (path, _status), number in asked.items():
        if path in _GENERATING:
            kind = path.removeprefix("/v1/")
            requests[kind] = requests.get(kind, 0) + int(number)
    level, model, software = next(iter(samples.get("tsqp_server_info", {})), ("?", "?", "?"))
    blocks = count("blocks_total")
    seconds = {part: value for (part,), value in samples.get("tsqp_engine_part_seconds_total", {}).items()}
    return Reading(
        kind="server",
        software=printable(software),
        model=printable(model),
        serves=printable(level),
        ready=bool(_one(samples, _READY_VALUE)),
        uptime_s=_one(samples, "tsqp_server_uptime_seconds"),
        requests=requests,
        counters={
            "tokens": count("completion_tokens_total"),
            "prompt_tokens": count("prompt_tokens_total"),
            "bytes_in": count("bytes_received_total"),
            "bytes_out": count("bytes_sent_total"),
        },
        parts=_parts(seconds),
        waiting=count("queued"),
        running=count("running"),
        batch=count("batch_rows"),
        cache_used=1 - count("blocks_free") / blocks if blocks else None,
        pool_held=count("pool_held"),
        pool_wanted=count("pool_wanted"),
        workers=count("workers"),
        workers_usable=count("workers_usable"),
        errors=int(sum(number for (path, status), number in asked.items() if _is_error(path, status))),
        failed=int(sum(samples.get("tsqp_generations_failed_total", {}).values())),
        integrity_failures=count("integrity_failures_total"),
    )


def _is_error(path: str, status: str) -> bool:
    return path.startswith(_API) and not (status.isdecimal() and int(status) < _FAILED)


def _parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return times that do not overlap, but for what goes on beside steps: the enclave's own is told by its parts."""
    inner = {name: seconds[name] for name in _OF_ENCLAVE if seconds.get(name)}
    rest = max(0.0, seconds.get("enclave", 0.0) - sum(inner.values()))
    outer = {name: seconds.get(name, 0.0) for name in ("worker", "wire")}
    beside = {name: seconds[name] for name in BESIDE if seconds.get(name)}
    return {**outer, **inner, "rest": rest, "sampling": seconds.get("sampling", 0.0), **beside}
