"""A small stand-in for ``tsqp serve``: the page with scripted answers, so that tests of the page need no model."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import tsqp.serve

PAGE = Path(str(tsqp.serve.__path__[0])) / "page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
QUESTION = "What is the capital of France?"


def histogram(level: str, seed: int = 0) -> dict[str, Any]:
    """Return counts as the level's rows would give: a bell in clear, even where masked."""
    draw = random.Random(seed)
    if level == "masked":
        return {"counts": [900 + draw.randrange(-60, 61) for _ in range(64)], "limit": 2.0**31}
    counts = [int(9000 * 2.718281828 ** (-(((bin_ - 31.5) / 7) ** 2))) + draw.randrange(12) for bin_ in range(64)]
    return {"counts": counts, "limit": 4.0 if level == "open" else 128.0}


def words(level: str, count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    if level == "masked":
        return [f"{draw.getrandbits(32):08x}" for _ in range(count)]
    if level == "open":
        return [f"{draw.gauss(0, 1):+.3f}" for _ in range(count)]
    return [str(int(draw.gauss(0, 30))) for _ in range(count)]


def snapshot(level: str, answer: str = "", run: int = 1) -> dict[str, Any]:
    """Return what the worker's view says at a level, with so much of the answer generated."""
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    noise = "ettle Provincial ${( zinc Kilometers Ott parchment oscill"
    reading = {
        "open": {"by": "ids", "prompt": prompt, "answer": answer, "sure": 1.0},
        "verified": {"by": "nearest", "prompt": prompt, "answer": answer, "sure": 0.97},
        "masked": {"by": "nearest", "prompt": noise, "answer": " Mend" * (len(answer) // 6), "sure": 0.0},
    }[level]
    dtype = "float32" if level == "open" else "int32"
    names = ("layers.29.down", "layers.29.gate_up", "layers.29.o", "layers.29.qkv", "head")
    last = [
        {"operation": "Linear", "group": name, "rows": 1, "dtype": dtype, "size_bytes": 2304,
         "words": words(level, 6, seed), "histogram": histogram(level, seed)}
        for seed, name in enumerate(names)
    ]  # fmt: skip
    return {
        "level": level, "run": run, "serves": "open" if level == "open" else "exact",
        "requests": 121 * (1 + len(answer)),
        "size_bytes": 3_400_000 + 1000 * len(answer), "words": words(level, 48, len(answer)), "reading": reading,
        "histogram": histogram(level), "last": last,
    }  # fmt: skip


@dataclass
class Fake:
    """What the stand-in answers, and what it was asked.

    Attributes:
        level: of the view; None offers none.
        pieces: of the answer, one event each.
        gate: each piece is sent when it is released; None sends all at once.
        key: that requests must carry.
        failure: sent as an error event after the pieces.
        refusal: status and message with which chat requests are refused.
        names_model: the list of models is answered once it is set.
    """

    level: str | None = "open"
    pieces: tuple[str, ...] = ("The", " capital", " of", " France", " is", " Paris", ".")
    gate: threading.Semaphore | None = None
    key: str = ""
    failure: str = ""
    refusal: tuple[int, str] | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    names_model: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    sent: str = ""
    hung_up: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.names_model.set()

    def status(self) -> dict[str, Any]:
        """Return ``EngineStats`` as JSON, with the model's name and the level."""
        done = len(self.sent)
        masked = self.level == "masked"
        seconds = {"worker": 0.8, "wire": 0.1, "enclave": 0.4, "attention": 0.12, "sampling": 0.03}
        if masked:
            seconds |= {"quantise": 0.05, "mask": 0.06, "check": 0.07, "mask_wait": 0.0, "mask_fill": 0.5}
        return {
            "running": int(bool(done) and not self.closing.is_set()), "queued": 0, "blocks_free": 240,
            "blocks_total": 256, "block_tokens": 16, "steps": done, "prompt_tokens": 30, "completion_tokens": done,
            "reused_tokens": 0, "batch_rows": 1, "pool_held": 93_000 if masked else 0,
            "pool_wanted": 124_000 if masked else 0, "bytes_sent": 40_000 * done, "bytes_received": 90_000 * done,
            "integrity_failures": 0, "workers": 1, "workers_usable": 1,
            "seconds": {name: value * done / 20 for name, value in seconds.items()},
            "ready": True, "reason": "", "model": "smollm2", "level": self.level or "masked",
            "view": self.level is not None,
        }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    fake: ClassVar[Fake]
    protocol_version = "HTTP/1.0"  # a stream ends with its connection

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.fake.paths.append(path)
        file = PAGE / (path[1:] or "index.html")
        if file.is_file():
            self._send(200, TYPES[file.suffix], file.read_bytes())
        elif not self._allowed():
            self._error(401, "an API key is needed.")
        elif path == "/status":
            self._json(200, self.fake.status())
        elif path == "/v1/models":
            self.fake.names_model.wait()
            self._json(200, {"object": "list", "data": [{"id": "smollm2", "object": "model"}]})
        elif path == "/view" and self.fake.level:
            self._view(self.fake.level)
        else:
            self._error(404, "there is no such page.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            self._error(401, "an API key is needed.")
        elif self.fake.refusal:
            self._error(*self.fake.refusal)
        else:
            self.fake.asked.append(body)
            self._answer()

    def _allowed(self) -> bool:
        return not self.fake.key or self.headers["Authorization"] == f"Bearer {self.fake.key}"

    def _answer(self) -> None:
        self._start("text/event-stream")
        try:
            for piece in self.fake.pieces:
                while self.fake.gate and not self.fake.gate.acquire(timeout=0.05):
                    self._write(": padding\n\n")
                    if self.fake.closing.is_set():
                        return
                self.fake.sent += piece
                self._event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if self.fake.failure:
                self._event({"error": {"message": self.fake.failure, "type": "server_error"}})
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": len(self.fake.pieces)}})
            self._write("data: [DONE]\n\n")
        except OSError:
            self.fake.hung_up.set()

    def _view(self, level: str) -> None:
        self._start("text/event-stream")
        try:
            while not self.fake.closing.wait(0.1):
                event = snapshot(level, self.fake.sent) if self.fake.asked else {**snapshot(level), "requests": 0}
                self._event(event)
        except OSError:
            pass

    def _event(self, event: dict[str, Any]) -> None:
        self._write(f"data: {json.dumps(event)}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())

    def _start(self, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", CSP)
        self.end_headers()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self._start(kind, status)
        self.wfile.write(body)

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "invalid_request_error"}})


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Serve a stand-in on a free port for a ``with`` block."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        fake.names_model.set()
        server.shutdown()
        thread.join()
        server.server_close()
