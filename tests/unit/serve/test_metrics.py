"""What /metrics and /status tell."""

from __future__ import annotations

import threading

import pytest
from fake_engine import MODEL, FakeEngine
from fastapi.testclient import TestClient
from serving import Serve, metrics_of

from tsqp import __version__
from tsqp.engine.api import QueueFullError
from tsqp.errors import IntegrityError


def test_metrics_count_requests_and_tokens_and_tell_the_engines_numbers(serve: Serve) -> None:
    client = serve(FakeEngine())
    client.post("/v1/completions", json={"model": MODEL, "prompt": "abc", "max_tokens": 4})
    client.post("/v1/completions", json={"model": "other", "prompt": "abc"})
    client.get("/some/path/of/yours")
    found = metrics_of(client.get("/metrics").text)
    assert found["tsqp_http_requests_total", ("/v1/completions", "200")] == 1
    assert found["tsqp_http_requests_total", ("/v1/completions", "404")] == 1
    assert found["tsqp_http_requests_total", ("other", "404")] == 1
    assert found["tsqp_time_to_first_token_seconds_count", ()] == 1
    assert found["tsqp_time_per_token_seconds_count", ()] == 3
    for name, value in {
        "engine_prompt_tokens_total": 3,
        "engine_completion_tokens_total": 4,
        "engine_reused_tokens_total": 5,
        "engine_queued": 3,
        "engine_batch_rows": 4,
        "engine_pool_held": 100,
        "engine_pool_wanted": 200,
        "engine_bytes_sent_total": 1000,
        "engine_bytes_received_total": 2000,
        "engine_integrity_failures_total": 1,
        "engine_workers": 2,
        "engine_workers_usable": 1,
        "engine_ready": 1,
        "http_generations_in_flight": 0,
    }.items():
        assert found[f"tsqp_{name}", ()] == value, name
    assert found["tsqp_engine_part_seconds_total", ("worker",)] == 1.5
    used = {labels: value for (name, labels), value in found.items() if name == "tsqp_engine_worker_in_use"}
    assert used == {("tcp://a:1",): 1, ("tcp://b:1",): 0}
    assert found["tsqp_engine_worker_rows_total", ("tcp://b:1",)] == 30


def test_metrics_tell_what_is_served_and_since_when(serve: Serve) -> None:
    client = serve(FakeEngine(), level="masked")
    first, second = (metrics_of(client.get("/metrics").text) for _ in range(2))
    assert first["tsqp_server_info", ("masked", MODEL, f"tsqp {__version__}")] == 1
    assert 0 < first["tsqp_server_uptime_seconds", ()] < second["tsqp_server_uptime_seconds", ()]


def failures(client: TestClient) -> dict[str, float]:
    """Return how many generations failed, by code."""
    found = metrics_of(client.get("/metrics").text)
    return {labels[0]: value for (name, labels), value in found.items() if name == "tsqp_generations_failed_total"}


@pytest.mark.parametrize("stream", [True, False])
def test_generations_that_fail_are_counted_whatever_the_status(stream: bool, serve: Serve) -> None:  # noqa: FBT001
    engine = FakeEngine(fail_after=2)
    client = serve(engine)
    body = {"model": MODEL, "prompt": "abc", "stream": stream}
    client.post("/v1/completions", json=body)
    assert failures(client) == {"worker_unavailable": 1}
    engine.fail_after = None
    client.post("/v1/completions", json=body)
    assert failures(client) == {"worker_unavailable": 1}
    engine.fail_after, engine.error = 0, IntegrityError("linear:7: the product is wrong.")
    client.post("/v1/completions", json=body)
    engine.refusal = QueueFullError("too many requests wait.")
    assert client.post("/v1/completions", json=body).status_code == 429
    assert failures(client) == {"worker_unavailable": 1, "integrity_error": 1}
    statuses = metrics_of(client.get("/metrics").text)
    assert statuses["tsqp_http_requests_total", ("/v1/completions", "200")] == (3 if stream else 1)


@pytest.mark.parametrize("stream", [True, False])
def test_generations_that_the_end_of_the_server_cuts_off_are_counted(stream: bool, serve: Serve) -> None:  # noqa: FBT001
    engine = FakeEngine(hold_after=2)
    client = serve(engine)
    body = {"model": MODEL, "prompt": ["a", "b"], "stream": stream}
    asking = threading.Thread(target=lambda: client.post("/v1/completions", json=body))
    asking.start()
    engine.wait_until_submitted(2)
    engine.close()
    asking.join()
    assert failures(client) == {"stopping": 1}


def test_status_is_what_the_page_shows(serve: Serve) -> None:
    status = serve(FakeEngine()).get("/status").json()
    assert (status["model"], status["level"], status["running"], status["seconds"]["wire"]) == (MODEL, "open", 0, 0.5)
