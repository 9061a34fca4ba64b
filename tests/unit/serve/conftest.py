"""The application without sockets: requests go to it directly, as if from this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine, tiny_served
from fastapi.testclient import TestClient
from serving import Serve

from tsqp.config import ServeConfig
from tsqp.serve.app import View, create_app
from tsqp.serve.served_model import ServedModel


@pytest.fixture
def serve() -> Iterator[Serve]:
    made: list[TestClient] = []

    def start(
        engine: FakeEngine,
        *,
        model: ServedModel | None = None,
        level: str = "open",
        view: View | None = None,
        host: str = "127.0.0.1",
        client: str = "127.0.0.1",
        **settings: Any,
    ) -> TestClient:
        app = create_app(engine, model or tiny_served(level), ServeConfig(**settings), view=view)
        test = TestClient(app, base_url=f"http://{host}", client=(client, 50000))
        made.append(test)
        return test

    yield start
    for test in made:
        test.close()
