"""FastAPI reports requests and exceptions to OpenTelemetry where it is set up; it must not in an enclave."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine
from serving import Serve

telemetry = pytest.importorskip("fastapi.telemetry._asgi")
CANARY = "xyzzy-plugh-secret"


class Collector:
    """Stands for any provider of OpenTelemetry: notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def tell(*arguments: object, **options: object) -> Collector:
            self.told.append(f"{name} {arguments} {options}")
            return self

        return tell


def test_nothing_is_told_to_a_collector(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setattr(telemetry._logs, "get_logger_provider", lambda: collector)
    monkeypatch.setattr(telemetry.trace, "get_tracer_provider", lambda: collector)
    monkeypatch.setattr(telemetry.metrics, "get_meter_provider", lambda: collector)
    client = serve(FakeEngine())
    assert client.get(f"/{CANARY}?{CANARY}").status_code == 404
    asked = {"model": MODEL, "prompt": CANARY, "max_tokens": 1}
    assert client.post("/v1/completions", json=asked).status_code == 200
    assert client.post("/v1/completions", json={**asked, CANARY: 1}).status_code == 400
    assert collector.told == []
