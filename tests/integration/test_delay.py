"""A link with an injected delay: the same result, later; and overlap waits for it once instead of for every part."""

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


def test_overlap_waits_less_than_one_part_after_the_other(tiny_llama: Path, url: str) -> None:
    """Four sequences one after the other wait for four times as many replies as four that take turns."""
    ids_BT = random_ids(4, 8)
    model = open_model(str(tiny_llama), "open")
    with delayed(url, DELAY_S) as slow:
        with runnable("open", model, EnclaveConfig(worker=slow, micro_batches=4)) as together:
            started = time.perf_counter()
            together.predict(ids_BT)
            overlapped_s = time.perf_counter() - started
        with runnable("open", model, EnclaveConfig(worker=slow, micro_batches=1)) as one:
            started = time.perf_counter()
            for row in ids_BT:
                one.predict(row[None])
            serial_s = time.perf_counter() - started
    assert overlapped_s < 0.6 * serial_s


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


@pytest.mark.parametrize("parts", [1, 4])
def test_chunks_of_one_prompt_are_away_at_once(tiny_llama: Path, url: str, parts: int) -> None:
    ids_BT = random_ids(1, 64)
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
