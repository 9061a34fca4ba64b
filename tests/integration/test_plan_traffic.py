"""Round trips and bytes that are planned with are those that a session's meter counts, at every level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs
from workers import StartWorker, packed_tiny

from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable
from tsqp.loaded import run_together
from tsqp.model.paged_cache import PagedCache, SequencePart
from tsqp.plan.calls import Call, calls, traffic
from tsqp.transport.base import Buffer, ClientTransport, Delivery
from tsqp.wire import messages
from tsqp.wire.messages import TensorSpec


class Watched:
    """A link that keeps the headers that pass."""

    def __init__(self, link: ClientTransport) -> None:
        self._link = link
        self.sent: list[bytes] = []
        self.received: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def send(self, frames: Sequence[Buffer]) -> None:
        self.sent.append(bytes(frames[0]))
        self._link.send(frames)

    def receive(self, timeout_s: float) -> Delivery:
        delivery = self._link.receive(timeout_s)
        self.received.append(bytes(delivery.frames[0]))
        return delivery


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """In floats and packed."""
    if request.param == "bundled":
        return request.getfixturevalue("bundled_directory"), request.getfixturevalue("bundled_packed")
    tiny: Path = request.getfixturevalue("tiny_llama")
    return tiny, packed_tiny(tiny, tmp_path_factory.mktemp("plan") / "packed")


@pytest.mark.parametrize("level", ["open", "verified", "masked"])
def test_what_is_planned_is_what_the_meter_counts(level: str, models: tuple[Path, Path], worker: StartWorker) -> None:
    model = open_model(str(models[0] if level == "open" else models[1]), level)
    links: list[Watched] = []

    def wrapped(link: ClientTransport) -> Watched:
        links.append(Watched(link))
        return links[-1]

    config = EnclaveConfig(level=level, worker=worker(models[0] if level == "open" else models[1]))
    planned = calls(model.architecture, level, "float32")
    with runnable(level, model, config, wrap=lambda _peer: wrapped) as loaded:
        assert loaded.stepper
        cache = PagedCache(model.architecture, 8)
        # A step of generation, a prompt's last chunk beside it, and a chunk that keeps nothing.
        last, answer = SequencePart([3, 4, 5], 0, (1,), "last"), SequencePart([7], 2, (2,), "last")
        for parts, rows, kept in (
            ([answer], 1, 1),
            ([last, answer], 4, 2),
            ([SequencePart([3, 4], 0, (3,), "none")], 2, 0),
        ):
            link = links[-1]
            before, passed = replace(loaded.meter), (len(link.sent), len(link.received))
            with loaded.stepper.paused():
                run_together([(loaded.stepper, [cache.rows(parts)])])
            cost = loaded.meter.since(before)
            expected = traffic(planned, rows, kept)
            made = [call for call in planned if kept or not call.is_kept]
            # Headers of a young link have shorter numbers than the planned ones; nothing else may differ.
            sent = [decode(header, messages.Envelope).id for header in link.sent[passed[0] :]]
            received = [decode(header, messages.Result) for header in link.received[passed[1] :]]
            sizes = [call.headers(call.rows(rows, kept)) for call in made]
            shorter = [
                (usual[0] - call.headers(call.rows(rows, kept), number)[0], usual[1] - size_of(call, rows, kept, reply))
                for call, usual, number, reply in zip(made, sizes, sent, received, strict=True)
            ]
            assert cost.bytes_sent == expected.sent - sum(a for a, _ in shorter)
            assert cost.bytes_received == expected.received - sum(b for _, b in shorter)


def decode(header: bytes, kind: Any) -> Any:
    return msgspec.msgpack.decode(header, type=kind)


def size_of(call: Call, rows: int, kept: int, reply: messages.Result) -> int:
    """Return how long the planned reply's header is with the numbers of another one."""
    y = TensorSpec(call.received.dtype, (call.rows(rows, kept), *call.received.shape))
    return len(messages.encode(structs.replace(reply, y=y)))


@pytest.mark.parametrize("level", ["open", "verified", "masked"])
def test_a_step_that_keeps_nothing_asks_for_less(level: str, tiny_llama: Path) -> None:
    planned = calls(open_model(str(tiny_llama), "open").architecture, level, "float32")
    full, chunk = traffic(planned, 8, 1), traffic(planned, 8, 0)
    assert chunk.round_trips < full.round_trips
    assert chunk.sent < full.sent
