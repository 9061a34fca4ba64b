"""Runs the application under uvicorn: a socket that is bound early, TLS, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tsqp.config import ServeConfig
from tsqp.engine.api import Engine
from tsqp.errors import ConfigError
from tsqp.tee import tee_name

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# For answers to be written after the engine has ended them.
_LAST_WORDS_S = 5.0
_LAST_WORDS_IN_A_HURRY_S = 0.5
_TICK_S = 0.1
_BACKLOG = 1024


def check_exposure(settings: ServeConfig, on_notice: Callable[[str], None], *, own_key: bool = False) -> None:
    """Refuse to serve strangers, and prompts in clear out of a TEE.

    Args:
        settings: host, keys and TLS.
        on_notice: told in a sentence what the user should know.
        own_key: whether the server makes its TLS key itself, to be attested.

    Raises:
        ConfigError: others could use the server without a key, half of a TLS key pair is missing, or one is given
            where the server makes its own.
    """
    if own_key and (settings.tls_cert or settings.tls_key):
        raise ConfigError(
            "with attestation the server makes its own TLS key, which is what the quote speaks for; a key from a file "
            "is known to whoever wrote the file. Leave out --tls-cert and --tls-key, or say --attestation off."
        )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise ConfigError("TLS needs both a certificate and its key: give --tls-cert and --tls-key.")
    if settings.tls_cert is not None:
        _check_certificate(settings)
    if _is_loopback(settings.host):
        return
    if settings.api_keys is None:
        raise ConfigError(
            f"{settings.host} can be reached from elsewhere, and there are no API keys: give --api-keys FILE "
            "('tsqp serve --api-keys FILE --new-api-key NAME' makes one), or serve on 127.0.0.1."
        )
    if settings.tls_cert is None and not own_key:
        sentence = f"prompts and answers travel to and from {settings.host} unencrypted: give --tls-cert and --tls-key."
        if (tee := tee_name()) is not None:
            raise ConfigError(f"inside {tee}, {sentence}")
        on_notice(sentence)


def bind(settings: ServeConfig) -> socket.socket:
    """Take the address before anything that takes time is done.

    Raises:
        ConfigError: it is not one of this machine, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {settings.host} cannot be resolved: {error.strerror}.") from error
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}. Choose another --port."
        ) from error
    return taken


def url_of(listening: socket.socket, settings: ServeConfig, *, own_key: bool = False) -> str:
    """Return the address to give to people."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'https' if settings.tls_cert or own_key else 'http'}://{host}:{listening.getsockname()[1]}"


class Server(uvicorn.Server):
    """uvicorn, with an end in which the engine takes no more requests and finishes those that run.

    Args:
        app: from ``create_app``.
        engine: to close at the end.
        settings: TLS and ``drain_s``.
        on_ready: called once requests are accepted.
        context: with the server's own TLS key; None for the one that settings name, if they do.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        settings: ServeConfig,
        on_ready: Callable[[], None] = lambda: None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=_BACKLOG,
                ssl_certfile=settings.tls_cert,
                ssl_keyfile=settings.tls_key,
                ssl_context_factory=None if context is None else lambda _config, _default: context,
                timeout_graceful_shutdown=int(settings.drain_s + _LAST_WORDS_S) + 1,
            )
        )
        self._app, self._engine, self._drain_s, self._on_ready = app, engine, settings.drain_s, on_ready
        self._hurries = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engine, which ends every answer, while connections are still served."""
        self._app.state.stopping.set()
        closing = asyncio.ensure_future(asyncio.to_thread(self._engine.close, drain_s=self._drain_s))
        hurrying = asyncio.ensure_future(self._hurry())
        try:
            await super().shutdown(sockets)
            await closing
        finally:
            hurrying.cancel()

    async def _hurry(self) -> None:
        """Once told to, end every answer now, and soon after it the connections whose clients do not read that."""
        while not self._hurries:  # noqa: ASYNC110  a signal handler sets it, outside of the loop
            await asyncio.sleep(_TICK_S)
        await asyncio.to_thread(self._engine.close)
        await asyncio.sleep(_LAST_WORDS_IN_A_HURRY_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at a second Ctrl-C without waiting for answers, which uvicorn's own way would end in tracebacks."""
        del frame
        self._hurries |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on Ctrl-C and SIGTERM. Unlike uvicorn's own, this does not raise them again: stopping is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_certificate(settings: ServeConfig) -> None:
    def refuse_password() -> str:
        raise ConfigError(f"{settings.tls_key} is encrypted with a password: give a key without one.")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            settings.tls_cert or "", settings.tls_key, password=refuse_password
        )
        # A group may read it: that is how systemd shows a credential, and Debian a key to its servers.
        mode = stat.S_IMODE(Path(settings.tls_key or "").stat().st_mode)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and its key in PEM form: "
            f"{getattr(error, 'reason', None) or error.args[-1]}."
        ) from error
    if mode & stat.S_IRWXO:
        raise ConfigError(
            f"{settings.tls_key} can be read by everybody on this machine (mode {mode:04o}): run 'chmod o=' on it, or "
            "make a new key."
        )


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
