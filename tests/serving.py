"""What tests of the HTTP application share: how a client of it is made."""

from __future__ import annotations

from typing import Any, Protocol

from fake_engine import FakeEngine
from fastapi.testclient import TestClient

from tsqp.serve.app import View
from tsqp.serve.served_model import ServedModel


class Serve(Protocol):
    """Makes clients of an application."""

    def __call__(
        self,
        engine: FakeEngine,
        *,
        model: ServedModel | None = None,
        level: str = "open",
        view: View | None = None,
        host: str = "127.0.0.1",
        client: str = "127.0.0.1",
        **settings: Any,
    ) -> TestClient: ...
