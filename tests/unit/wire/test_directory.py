"""A directory from anybody is a valid one, or refused by an error of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.errors import ProtocolError
from tsqp.transport.keys import ephemeral
from tsqp.wire import directory
from tsqp.wire.directory import MAX_BYTES, MAX_PEERS, Directory, Entry

KEY = ephemeral().public.decode()
GOOD: dict[str, Any] = {
    "version": 1,
    "workers": [{"address": "tcp://10.0.0.1:5000", "key": KEY}, {"address": "tcp://[fd00::2]:5000"}],
    "dealers": [{"address": "tcp://dealer.example:50052", "key": KEY}],
}


def with_worker(address: object, key: object = None) -> dict[str, Any]:
    return {"version": 1, "workers": [{"address": address, "key": key}]}


def test_a_directory_is_read_as_it_was_written() -> None:
    written = Directory(
        version=1, workers=(Entry("tcp://10.0.0.1:5000", KEY),), dealers=(Entry("tcp://localhost:50052"),)
    )
    assert directory.decode(directory.encode(written)) == written
    assert directory.decode(json.dumps(GOOD).encode()).workers[1] == Entry("tcp://[fd00::2]:5000")


@pytest.mark.parametrize(
    "bad",
    [
        {},
        [],
        {**GOOD, "version": 2},
        {**GOOD, "more": 1},
        with_worker("shm:///dev/shm/tsqp-worker"),
        with_worker("ipc:///run/user/0/worker"),
        with_worker("10.0.0.1:5000"),
        with_worker("TCP://10.0.0.1:5000"),
        with_worker("tcp://10.0.0.1:5000\n"),
        with_worker("tcp://10.0.0.1:0"),
        with_worker("tcp://10.0.0.1:70000"),
        with_worker("tcp://10.0.0.1;tcp://10.0.0.2:1"),
        with_worker("tcp://" + "a" * 300 + ":1"),
        with_worker("tcp://\x1b[31mhost:1"),
        with_worker(5),
        with_worker("tcp://10.0.0.1:5000", "short"),
        with_worker("tcp://10.0.0.1:5000", "\u20ac" * 40),
        with_worker("tcp://10.0.0.1:5000", "/" * 36 + ".key"),
        {"version": 1, "workers": [{"address": "tcp://10.0.0.1:5000"}] * 2},
        {"version": 1, "workers": [{"address": "tcp://localhost:1"}], "dealers": [{"address": "tcp://127.0.0.1:1"}]},
        {"version": 1, "workers": [{"address": f"tcp://10.0.0.1:{port}"} for port in range(1, MAX_PEERS + 2)]},
    ],
)
def test_what_is_no_directory_is_refused(bad: object) -> None:
    with pytest.raises(ProtocolError, match="directory"):
        directory.decode(json.dumps(bad).encode())


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b'{"version": 1, "x": "\xff"}', b"[" * 60000, b'{"version":1}' + b" " * MAX_BYTES]
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError, match="directory"):
        directory.decode(text)


def test_one_that_no_enclave_would_take_is_not_written() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        directory.encode(Directory(version=1, workers=(Entry("tcp://10.0.0.1:5000"),) * 2))


def answered(text: bytes) -> None:
    try:
        found = directory.decode(text)
    except ProtocolError:
        return
    assert all(entry.address.startswith("tcp://") for entry in (*found.workers, *found.dealers))
    assert directory.decode(directory.encode(found)) == found


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20
)
ADDRESSES = st.text() | st.from_regex(r"tcp://[a-z0-9.\[\]:]{0,20}:[0-9]{0,6}") | st.just("tcp://10.0.0.1:5000")
ENTRIES = st.fixed_dictionaries({"address": ADDRESSES}, optional={"key": st.text() | st.just(KEY), "more": JSON})
SHAPED = st.fixed_dictionaries(
    {"version": st.integers(0, 2)}, optional={"workers": st.lists(ENTRIES) | JSON, "dealers": st.lists(ENTRIES)}
)


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_answered(text: bytes) -> None:
    answered(text)


@given(SHAPED)
def test_what_has_the_shape_of_a_directory_is_answered(value: object) -> None:
    answered(json.dumps(value).encode())


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_directory_with_one_byte_changed_is_answered(place: int, byte: int) -> None:
    text = bytearray(json.dumps(GOOD).encode())
    text[place % len(text)] = byte
    answered(bytes(text))
