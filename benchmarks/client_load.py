"""Generates load for a worker: many clients of the real protocol in one process, without torch.

python benchmarks/client_load.py URL < JOB > RESULT

A job is JSON: ``clients``; ``steps``, of each the ``header`` of a request without its id, and ``fill``, what its frame
is filled with (``words`` random bytes, ``floats`` random float32); ``seconds`` to run, 0 until another line comes, or
``rounds`` of all steps; ``seed``. Every client has a socket of its own and one request in flight, and sends its steps
in order, again and again. It prints ``ready``, waits for a line, and prints one JSON object: ``served``, requests by
client; ``latencies_ms`` of all clients, quartiles and 99th percentile; ``failures``; and ``digests``, by client a
SHA-256 of all frames of the replies to the first round.
"""

from __future__ import annotations

import array
import functools
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from tsqp.wire import messages

_KINDS: dict[str, type[messages.AnyRequest]] = {
    "linear": messages.Linear,
    "linear_chain": messages.LinearChain,
    "linear_exact": messages.LinearExact,
}
_PATIENCE_MS = 120_000
# Frames that clients share; each client starts at another.
_FRAMES = 8


@functools.cache
def filled(spec: messages.TensorSpec, fill: str, seed: int) -> bytes:
    """Return a frame's bytes, the same for the same seed."""
    generator = random.Random(seed)  # noqa: S311  activations, not secrets
    count = math.prod(spec.shape)
    if fill == "words":
        return generator.randbytes(4 * count)
    return array.array("f", [generator.gauss(0, 1) for _ in range(count)]).tobytes()


def _header(kind: Any, words: dict[str, Any], spec: messages.TensorSpec, request_id: int) -> messages.AnyRequest:  # noqa: ANN401  of _KINDS
    header: messages.AnyRequest = kind(id=request_id, x=spec, **words)
    return header


class LoadClient:
    """One client: a socket, and where in its steps it is."""

    def __init__(self, context: zmq.Context[Any], url: str, steps: list[dict[str, Any]], seed: int) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(url)
        self._steps: list[tuple[Callable[[int], messages.AnyRequest], bytes]] = []
        for step in steps:
            words = dict(step["header"])
            kind = _KINDS[words.pop("op")]
            spec = msgspec.convert(words.pop("x"), messages.TensorSpec)
            frame = filled(spec, step["fill"], seed % _FRAMES)
            self._steps.append((functools.partial(_header, kind, words, spec), frame))
        self._at = 0
        self._started = 0.0
        self.served = 0
        self.failures: list[str] = []
        self.latencies_ms: list[float] = []
        self._digest = hashlib.sha256()

    def send(self) -> None:
        """Send the next request."""
        make, frame = self._steps[self._at % len(self._steps)]
        self._started = time.perf_counter()
        self.socket.send_multipart([messages.encode(make(self._at + 1)), frame], copy=False)

    def take(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        """Take the reply, which must be of the request sent last."""
        header, *frames = self.socket.recv_multipart(copy=False)
        self.latencies_ms.append(1000 * (time.perf_counter() - self._started))
        reply = decoder.decode(header.buffer)
        if reply.id != self._at + 1 or not isinstance(reply, messages.Result):
            self.failures.append(repr(reply))
        elif self._at < len(self._steps):
            for frame in frames:
                self._digest.update(frame.buffer)
        self.served += 1
        self._at += 1

    @property
    def rounds(self) -> int:
        """How often it has gone through all its steps."""
        return self._at // len(self._steps)

    @property
    def digest(self) -> str:
        """What came in the first round."""
        return self._digest.hexdigest()


def run(clients: list[LoadClient], seconds: float, rounds: int) -> float:
    """Let all clients run; return for how long they did."""
    decoder = msgspec.msgpack.Decoder(messages.AnyReply)
    poller = zmq.Poller()
    by_socket = {client.socket: client for client in clients}
    if not (seconds or rounds):
        poller.register(sys.stdin, zmq.POLLIN)
    for client in clients:
        poller.register(client.socket, zmq.POLLIN)
        client.send()
    started = time.perf_counter()
    running, told = len(clients), False
    while running:
        ready = poller.poll(_PATIENCE_MS)
        if not ready:
            raise SystemExit("no client got a reply for two minutes")
        now = time.perf_counter()
        told |= any(socket not in by_socket for socket, _ in ready)
        if told and not seconds and sys.stdin in poller:
            poller.unregister(sys.stdin)
        over = told or (seconds and now - started >= seconds)
        for socket, _ in ready:
            if socket not in by_socket:
                continue
            client = by_socket[socket]
            client.take(decoder)
            if over or (rounds and client.rounds >= rounds):
                running -= 1
            else:
                client.send()
    return time.perf_counter() - started


def main() -> None:
    job = json.loads(sys.stdin.readline())
    context: zmq.Context[Any] = zmq.Context()
    clients = [LoadClient(context, sys.argv[1], job["steps"], job["seed"] + at) for at in range(job["clients"])]
    print("ready", flush=True)
    sys.stdin.readline()
    elapsed_s = run(clients, job.get("seconds", 0.0), job.get("rounds", 0))
    latencies = sorted(each for client in clients for each in client.latencies_ms)
    quartiles = statistics.quantiles(latencies, n=100) if len(latencies) > 1 else latencies * 99
    report = {
        "elapsed_s": elapsed_s,
        "served": [client.served for client in clients],
        "latencies_ms": {f"p{at}": round(quartiles[at - 1], 3) for at in (25, 50, 75, 99)},
        "failures": [failure for client in clients for failure in client.failures],
        "digests": [client.digest for client in clients],
    }
    print(json.dumps(report))
    context.destroy(linger=0)


if __name__ == "__main__":
    main()
