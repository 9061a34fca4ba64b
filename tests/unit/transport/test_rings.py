"""Doorbell rings: order, room, and words that lie."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import ProtocolError
from tsqp.transport.datagrams import MAX_DATAGRAM
from tsqp.transport.rings import RING_BYTES, Ring, RingBell, pause_after

HEAD, TAIL = 0, 8
SMALL = 256


def ring_pair(size: int = SMALL) -> tuple[memoryview, memoryview, Ring, Ring]:
    """Return words and data, and both ends of one ring."""
    words, data = memoryview(bytearray(128)).cast("Q"), memoryview(bytearray(size))
    return words, data, Ring(words, data, HEAD, TAIL), Ring(words, data, HEAD, TAIL)


@given(st.lists(st.one_of(st.none(), st.binary(max_size=200)), max_size=60))
def test_datagrams_come_out_whole_and_in_order(steps: list[bytes | None]) -> None:
    """None takes one."""
    _, _, producer, consumer = ring_pair()
    waiting: list[bytes] = []
    for step in steps:
        if step is None:
            assert bool(consumer) == bool(waiting)
            if waiting:
                assert consumer.take() == waiting.pop(0)
            else:
                with pytest.raises(BlockingIOError):
                    consumer.take()
            continue
        used = sum(16 + len(one) + -len(one) % 8 for one in waiting)
        if used + 16 + len(step) + -len(step) % 8 > SMALL:
            with pytest.raises(BlockingIOError):
                producer.put(step)
        else:
            producer.put(step)
            waiting.append(step)


def test_the_longest_datagram_fits() -> None:
    _, _, producer, consumer = ring_pair(RING_BYTES)
    for _ in range(5):
        producer.put(b"x" * MAX_DATAGRAM)
        assert len(consumer.take()) == MAX_DATAGRAM


@pytest.mark.parametrize("head", [8, 12, SMALL + 8, (1 << 64) - 8])
def test_a_head_that_lies_is_found(head: int) -> None:
    words, _, _, consumer = ring_pair()
    words[HEAD] = head
    with pytest.raises(ProtocolError, match="head of a ring"):
        consumer.take()


@pytest.mark.parametrize("tail", [8, 12, (1 << 64) - 8])
def test_a_tail_that_lies_is_found(tail: int) -> None:
    words, _, producer, _ = ring_pair()
    words[TAIL] = tail
    with pytest.raises(ProtocolError, match="tail of a ring"):
        producer.put(b"x")


def test_a_tail_that_goes_back_so_far_that_it_frees_nothing_is_found() -> None:
    words, _, producer, consumer = ring_pair()
    for _ in range(20):
        producer.put(b"x" * 48)
        consumer.take()
    words[TAIL] = 0
    with pytest.raises(ProtocolError, match="tail of a ring"):
        producer.put(b"x")


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(struct.pack("<QQ", 1, 8), id="another number"),
        pytest.param(struct.pack("<QQ", 0, 9), id="longer than what is there"),
        pytest.param(struct.pack("<QQ", 0, (1 << 64) - 1), id="huge length"),
        pytest.param(struct.pack("<QQ", 0, MAX_DATAGRAM + 1), id="longer than any datagram"),
    ],
)
def test_a_record_that_lies_is_found(record: bytes) -> None:
    words, data, _, consumer = ring_pair()
    data[: len(record)] = record
    words[HEAD] = 24
    with pytest.raises(ProtocolError, match="a record in a ring"):
        consumer.take()


def test_a_wait_ends_in_time_and_asks_for_the_peer() -> None:
    asked: list[bool] = []
    _, _, producer, consumer = ring_pair()
    bell = RingBell(producer, consumer, lambda: asked.append(True), lambda: None)
    started = time.perf_counter()
    _, _, other, empty = ring_pair()
    assert not RingBell(other, empty, lambda: asked.append(True), lambda: None).wait(0.05)
    assert 0.05 <= time.perf_counter() - started < 5.0
    assert asked
    bell.send(b"x")
    assert bell.wait(60.0)
    assert bell.receive() == b"x"


def test_pauses_grow_to_a_millisecond() -> None:
    pauses = [pause_after(waited) for waited in (0.0, 0.0005, 0.004, 0.1, 100.0)]
    assert pauses == sorted(pauses)
    assert 0 < pauses[0] < 0.0001
    assert pauses[-1] == 0.001
