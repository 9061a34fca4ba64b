"""A link with an injected delay: the same result, later; and with overlap every part of a batch is away at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids
from workers import running_worker

from tsqp.bench.delay import delayed
from tsqp.config import EnclaveConfig
from tsqp.levels import open_model, runnable
from tsqp.transport.base import Buffer, ClientTransport, Delivery

DELAY_S = 0.02


@pytest.fixture
def url(tiny_llama: Path) -> Iterator[str]:
    with running_worker(tiny_llama, "shm") as url:
        yield url


def test_a_delayed_link_gives_the_same_logits_later(tiny_llama: Path, url: str) -> None:
    ids_BT = random_ids(1, 12)
    model = open_model(str(tiny_llama), "open")
    with runnable("open", model, EnclaveConfig(worker=url)) as direct:
        expected = direct.predict(ids_BT)
        trips = direct.meter.round_trips
        direct.predict(ids_BT)
        trips = direct.meter.round_trips - trips
    with delayed(url, DELAY_S) as slow, runnable("open", model, EnclaveConfig(worker=slow)) as far:
        started = time.perf_counter()
        assert torch.equal(far.predict(ids_BT), expected)
        taken_s = time.perf_counter() - started
    assert taken_s >= trips * 2 * DELAY_S


class Counting:
    """A link that counts how many requests are away at once."""

    def __init__(self, link: ClientTransport) -> None:
        self._link = link
        self.peer = link.peer
        self.allocate, self.discard, self.close = link.allocate, link.discard, link.close
        self._away = self.most = 0

    def send(self, frames: Sequence[Buffer]) -> None:
        self._away += 1
        self.most = max(self.most, self._away)
        self._link.send(frames)

    def receive(self, timeout_s: float) -> Delivery:
        delivery = self._link.receive(timeout_s)
        self._away -= 1
        return delivery


@pytest.mark.parametrize(("batch", "tokens", "parts"), [(1, 64, 1), (1, 64, 4), (4, 8, 1), (4, 8, 4)])
def test_parts_of_a_batch_are_away_at_once(tiny_llama: Path, url: str, batch: int, tokens: int, parts: int) -> None:
    """Chunks of one prompt, and sequences: so a delay is waited for once instead of once for every part."""
    ids_BT = random_ids(batch, tokens)
    model = open_model(str(tiny_llama), "open")
    links: list[Counting] = []

    def wrapped(link: ClientTransport) -> ClientTransport:
        links.append(Counting(link))
        return links[-1]

    with runnable("open", model, EnclaveConfig(worker=url, micro_batches=1)) as direct:
        expected = direct.predict(ids_BT)
    with delayed(url, DELAY_S) as slow, ExitStack() as stack:
        config = EnclaveConfig(worker=slow, micro_batches=parts)
        far = stack.enter_context(runnable("open", model, config, wrap=lambda _peer: wrapped))
        assert far.micro_batches(ids_BT) == parts
        torch.testing.assert_close(far.predict(ids_BT), expected)
    assert [link.most for link in links] == [parts]
