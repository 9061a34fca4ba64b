"""Reports of a worker and of a server, as ``tsqp top`` shows them."""

from __future__ import annotations

from tsqp.top.reading import Reading, report

WORKER = report(
    "127.0.0.1:50051",
    Reading(
        kind="worker", software="tsqp 3", model="tiny", serves="open", uptime_s=0.0, requests={}, parts={}, waiting=0,
        errors=0, counters=dict.fromkeys(("rows", "bytes_in", "bytes_out", "products", "product_requests"), 0),
    ),
    Reading(
        kind="worker", software="tsqp 3", model="tiny", serves="open", device="cuda:0", dtype="bfloat16",
        uptime_s=100.0, requests={"linear": 1234567}, clients=5, waiting=12, waiting_bytes=3_400_000,
        counters={"rows": 250, "bytes_in": 5e9, "bytes_out": 7e6, "products": 2, "product_requests": 9},
        parts={"computing": 50.0, "copying": 25.0}, memory_bytes=17_000_000_000, memory_total_bytes=150_000_000_000,
        errors=0, refused=0,
    ),
)  # fmt: skip
SERVER = report(
    "https://enclave.example:8000",
    Reading(
        kind="server", software="tsqp 3", model="tiny", serves="masked", uptime_s=0.0, requests={}, parts={},
        waiting=0, errors=0, counters={},
    ),
    Reading(
        kind="server", software="tsqp 3", model="tiny", serves="masked", uptime_s=10.0,
        requests={"chat/completions": 20}, waiting=3, running=8, batch=11, errors=4, failed=1, integrity_failures=2,
        counters={"tokens": 1500, "prompt_tokens": 30, "bytes_in": 1e7, "bytes_out": 1e6}, cache_used=0.42,
        pool_held=500, pool_wanted=1000, parts={"worker": 4.0, "wire": 1.0, "attention": 2.0, "mask_wait": 0.0},
    ),
)  # fmt: skip
