"""Runs the HTTP server before an engine in a thread of the test's process, on a free port."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fake_engine import FakeEngine, tiny_served

from tsqp.config import DEFAULT_TOKENS, ServeConfig
from tsqp.engine.api import Engine
from tsqp.serve.app import View, create_app
from tsqp.serve.attestation import Identity
from tsqp.serve.served_model import ServedModel
from tsqp.serve.server import Server, bind, url_of

_START_S = 60


@dataclass(frozen=True)
class Running:
    """A server that answers: its address, and the uvicorn server to stop."""

    url: str
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        """Ask it to end, as a signal does, and wait for that."""
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def http_server(
    engine: Engine,
    *,
    level: str = "open",
    model: ServedModel | None = None,
    view: View | None = None,
    default_tokens: int = DEFAULT_TOKENS,
    identity: Identity | None = None,
    **settings: object,
) -> Iterator[Running]:
    """Serve for the time of a ``with`` block; ``settings`` are ``ServeConfig``'s."""
    config = ServeConfig(**{"port": 0, "drain_s": 30.0, **settings})  # type: ignore[arg-type]  # names are the test's
    app = create_app(
        engine, model or tiny_served(level), config, default_tokens=default_tokens, view=view, identity=identity
    )
    listening = bind(config)
    started = threading.Event()
    server = Server(app, engine, config, on_ready=started.set, context=identity.context() if identity else None)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert started.wait(_START_S), "the server did not start"
        yield Running(url_of(listening, config, own_key=identity is not None), server, thread)
    finally:
        if isinstance(engine, FakeEngine):
            engine.release()
        server.should_exit = True
        thread.join()
        listening.close()


def own_certificate(directory: Path) -> tuple[Path, Path]:
    """Make a certificate of 127.0.0.1 and its key, signed by itself; return their files."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {cert} -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    return cert, key
