"""What tests of the HTTP application share: how its clients are made, what it tells, what its process may do."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any, Protocol

import pytest
from fake_engine import FakeEngine
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

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


def core_limits(pid: int) -> tuple[str, str]:
    """Return how large a core dump of a process may be: its limit, and the one that it cannot raise.

    They mean something only where this process has not both at 0, which the other inherits.
    """
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("core dumps are off on this machine: nothing can be told of who turned them off")
    text = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith("Max core file size"))
    soft, hard, _unit = line.removeprefix("Max core file size").split()
    return soft, hard


def metrics_of(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return all values of ``/metrics`` by name and labels."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
