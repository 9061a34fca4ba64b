"""What /metrics and /status tell."""

from __future__ import annotations

from fake_engine import MODEL, FakeEngine
from prometheus_client.parser import text_string_to_metric_families
from serving import Serve


def read(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return all values by name and labels."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_requests_and_tokens_and_tell_the_engines_numbers(serve: Serve) -> None:
    client = serve(FakeEngine())
    client.post("/v1/completions", json={"model": MODEL, "prompt": "abc", "max_tokens": 4})
    client.post("/v1/completions", json={"model": "other", "prompt": "abc"})
    client.get("/some/path/of/yours")
    found = read(client.get("/metrics").text)
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
        "engine_ready": 1,
        "http_generations_in_flight": 0,
    }.items():
        assert found[f"tsqp_{name}", ()] == value, name
    assert found["tsqp_engine_part_seconds_total", ("worker",)] == 1.5


def test_status_is_what_the_page_shows(serve: Serve) -> None:
    status = serve(FakeEngine()).get("/status").json()
    assert (status["model"], status["level"], status["running"], status["seconds"]["wire"]) == (MODEL, "open", 0, 0.5)
