"""Follows a pool's directory: which workers there are now, and where the dealers are whose keys are pinned.

The directory is untrusted. Read within bounds, it chooses among what the settings allow and widens nothing: a dealer is
who holds its pinned key; at `open` and `verified` a worker is who holds one of the pinned keys; at `masked` it may be
anybody, since it can neither read nor forge. Which level, how many dealers, and whether links may be in clear it does
not say.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig
from tsqp.engine.workers import Workers
from tsqp.errors import ConfigError, IntegrityError, TransportError, TsqpError, printable
from tsqp.transport.keys import load_public
from tsqp.transport.urls import parse
from tsqp.wire import directory
from tsqp.wire.directory import MAX_BYTES, Directory, Entry

_log = logging.getLogger(__name__)

# Who names so many that lie is listened to no more: each is remembered.
MAX_LIES = 1000
LOOK_S = 2.0
_PAUSE_S = 0.2
# Of one look, from the first byte to the last.
TIMEOUT_S = 5.0
_HTTP = "http://"


@dataclass(frozen=True, slots=True)
class Pins:
    """Who is trusted, whatever a directory says; public keys in z85.

    Attributes:
        workers: one of which a worker must hold; none means anybody, at `masked` only.
        dealers: each of which is a dealer, in order.
    """

    workers: frozenset[str]
    dealers: tuple[str, ...]


def pins(config: EnclaveConfig, engine: EngineConfig) -> Pins:
    """Return who is trusted by the settings of an enclave that follows a directory.

    Raises:
        ConfigError: they name workers as well, or no worker's key where one is needed, or no dealer's.
        SetupError: a key cannot be read.
    """
    if config.level not in WORKER_LEVELS:
        raise ConfigError(f"--directory names workers, and the level {config.level} has none: leave it out.")
    if engine.workers or config.worker:
        raise ConfigError("--directory and --worker exclude each other: leave one of them out.")
    keys = engine.worker_keys or ((config.worker_key,) if config.worker_key else ())
    if not keys and config.level != "masked":
        raise ConfigError(
            f"at the level {config.level} a worker reads every prompt, and a directory is not trusted to choose who "
            "that is: pin the workers' keys (--worker-key), or use --level masked."
        )
    if config.masks == "dealers" and not config.dealer_keys:
        raise ConfigError("a directory says where dealers are, not who is one: pin their keys (--dealer-key).")
    return Pins(frozenset(_texts(keys)), tuple(_texts(config.dealer_keys)))


def _texts(keys: Sequence[str]) -> list[str]:
    return [load_public(key).decode() for key in keys]


def read(source: str, timeout_s: float = TIMEOUT_S) -> Directory:
    """Read a directory.

    Args:
        source: ``http://HOST:PORT/PATH`` or a file.
        timeout_s: for all of it, after the name is resolved.

    Raises:
        ConfigError: it is neither.
        TransportError: it cannot be read now.
        ProtocolError: what is there is no directory.
    """
    if "://" not in source:
        return directory.decode(_from_file(source))
    if not source.startswith(_HTTP):
        raise ConfigError(f"the directory {printable(source)}: expected http://HOST:PORT/PATH or a file.")
    return directory.decode(_from_server(source, timeout_s))


def _from_file(path: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # noqa: PTH123  a descriptor
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"the directory {path} is no regular file.")
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise TransportError(f"the directory {path} cannot be read: {error.strerror}.") from error


def _from_server(url: str, timeout_s: float) -> bytes:
    """Fetch a page, without following it elsewhere. A peer that sends byte by byte has no longer than another."""
    try:
        place = urlsplit(url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=timeout_s)
    except (ValueError, http.client.InvalidURL) as error:
        raise ConfigError(f"the directory {printable(url)}: expected http://HOST:PORT/PATH or a file.") from error
    with contextlib.closing(connection):
        try:
            connection.connect()
            body, status = _answer(connection, place.path or "/", timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise TransportError(f"the directory {printable(url)} cannot be read: {reason}.") from error
    if status != http.client.OK:
        raise TransportError(f"the directory {printable(url)} cannot be read: HTTP {status}.")
    return body


def _answer(connection: http.client.HTTPConnection, path: str, timeout_s: float) -> tuple[bytes, int]:
    """Ask for a page; return it, up to ``MAX_BYTES`` and one, and the status. After ``timeout_s`` the link is cut."""
    link: socket.socket = connection.sock

    def cut() -> None:
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)

    late = threading.Timer(timeout_s, cut)
    late.daemon = True
    late.start()
    try:
        connection.request("GET", path, headers={"accept": "application/json"})
        with connection.getresponse() as answer:
            return answer.read(MAX_BYTES + 1), answer.status
    finally:
        late.cancel()


def chosen(
    found: Directory,
    config: EnclaveConfig,
    trusted: Pins,
    most: int,
    current: Collection[str] = (),
    has_lied: Callable[[EnclaveConfig], bool] = lambda _config: False,
) -> tuple[EnclaveConfig, ...]:
    """Return the settings for each worker that may be used, those of ``current`` first.

    Args:
        found: what the directory says.
        config: level, masks and whether links may be in clear; dealers that have addresses there keep them.
        trusted: from ``pins``.
        most: how many are used at most: each has links, vectors and a mask pool of its own.
        current: addresses in use, which stay so.
        has_lied: tells who is out of use for good.

    Raises:
        TransportError: no worker may be used, or a dealer is not there.
    """
    config = _with_dealers(found, config, trusted)
    allowed = [entry for entry in found.workers if _may_serve(entry, config, trusted)]
    allowed.sort(key=lambda entry: entry.address not in current)
    usable = [replace(config, worker=entry.address, worker_key=entry.key) for entry in allowed]
    usable = [each for each in usable if not has_lied(each)]
    if not usable:
        raise TransportError(
            f"the directory names {len(found.workers)} workers, and none that may be used at the level {config.level}: "
            f"{'none has a pinned key (--worker-key)' if trusted.workers else 'none has a key'}, or it has lied before."
        )
    return tuple(usable[:most])


def _with_dealers(found: Directory, config: EnclaveConfig, trusted: Pins) -> EnclaveConfig:
    """Return the settings with the address of each pinned dealer; the first, where several are said to be it."""
    if config.dealers or not trusted.dealers:
        return config
    places = {entry.key: entry.address for entry in reversed(found.dealers)}
    missing = [key for key in trusted.dealers if key not in places]
    if missing:
        raise TransportError(
            f"the directory names no dealer with the key {missing[0]}, which is pinned (--dealer-key): nothing is "
            "masked without it."
        )
    return replace(config, dealers=tuple(places[key] for key in trusted.dealers))


def _may_serve(entry: Entry, config: EnclaveConfig, trusted: Pins) -> bool:
    """Tell whether a worker is one that the settings allow."""
    if trusted.workers:
        if entry.key not in trusted.workers:
            return False
    elif config.level != "masked":
        return False
    endpoint = parse(entry.address)
    if entry.key is None:  # nothing secret is in it, but what the settings ask of links holds all the same
        in_clear = config.insecure == "on" or endpoint.stays_on_this_machine
        return in_clear and config.own_key is None
    return entry.key not in trusted.dealers and endpoint.url not in {parse(dealer).url for dealer in config.dealers}


def first_workers(config: EnclaveConfig, engine: EngineConfig) -> tuple[EnclaveConfig, ...]:
    """Return the settings for each worker that a directory names now; a pool has ``connect_timeout_s`` to come up.

    Raises:
        TsqpError: as ``pins``, ``read`` and ``chosen`` do.
    """
    trusted = pins(config, engine)
    deadline = time.monotonic() + config.connect_timeout_s
    while True:
        try:
            return chosen(read(engine.directory or ""), config, trusted, engine.directory_workers)
        except TransportError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSE_S)


class Follower:
    """A thread that reads a directory again and again, and tells an engine's workers of what has changed.

    Args:
        config: see ``chosen``.
        engine: where the directory is, and how many workers are used.
        first: what ``first_workers`` gave.
        workers: who are changed.
    """

    def __init__(
        self, config: EnclaveConfig, engine: EngineConfig, first: tuple[EnclaveConfig, ...], workers: Workers
    ) -> None:
        self._config, self._engine, self._last, self._workers = config, engine, first, workers
        self._trusted = pins(config, engine)
        self._told = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tsqp-directory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Follow it no more. A name that is being resolved is not waited for."""
        self._over.set()
        self._thread.join(TIMEOUT_S)

    def _work(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                self._look()
                self._told = ""
            except Exception as error:  # noqa: BLE001, PERF203  a bug here must not end the looking
                reason = (
                    str(error) if isinstance(error, TsqpError) else f"following it failed ({type(error).__name__})."
                )
                if reason != self._told:
                    self._told = reason
                    _log.warning("the workers stay as they are: %s", reason)

    def _look(self) -> None:
        if self._workers.lies > MAX_LIES:
            raise IntegrityError(
                f"more than {MAX_LIES} times somebody has lied: the directory is not followed any more."
            )
        configs = chosen(
            read(self._engine.directory or ""),
            self._config,
            self._trusted,
            self._engine.directory_workers,
            {each.worker for each in self._last if each.worker},
            lambda config: self._workers.liars.why(config) is not None,
        )
        if {*configs} != {*self._last}:
            self._workers.change(configs)
            self._last = configs
