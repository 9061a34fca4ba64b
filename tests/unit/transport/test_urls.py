"""Addresses as people write them: one form comes out, or a ``ConfigError`` that quotes what was written."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tsqp.errors import ConfigError
from tsqp.transport.urls import Endpoint, parse


@pytest.mark.parametrize(
    ("text", "url", "shown"),
    [
        ("localhost:50051", "tcp://127.0.0.1:50051", "localhost:50051"),
        ("tcp://10.0.0.2:1", "tcp://10.0.0.2:1", "10.0.0.2:1"),
        ("worker.example:65535", "tcp://worker.example:65535", "worker.example:65535"),
        ("[::1]:50051", "tcp://[::1]:50051", "::1:50051"),
        ("tcp://::1:50051", "tcp://[::1]:50051", "::1:50051"),
        ("ipc:///run/tsqp/worker", "ipc:///run/tsqp/worker", "ipc:///run/tsqp/worker"),
        ("shm:///run/tsqp/worker", "shm:///run/tsqp/worker", "shm:///run/tsqp/worker"),
    ],
)
def test_valid_addresses(text: str, url: str, shown: str) -> None:
    endpoint = parse(text)
    assert (endpoint.url, str(endpoint)) == (url, shown)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected host:port"),
        ("localhost", "expected host:port"),
        ("localhost:", "expected host:port"),
        (":50051", "expected host:port"),
        ("localhost:0", "from 1 to 65535"),
        ("localhost:65536", "from 1 to 65535"),
        ("localhost:-1", "expected host:port"),
        ("localhost:1.5", "expected host:port"),
        ("localhost:٣", "expected host:port"),
        ("localhost:²", "expected host:port"),
        ("[::1:1", "expected host:port"),
        ("::1]:1", "expected host:port"),
        ("[[::1]]:1", "expected host:port"),
        ("localhost:" + "9" * 5000, "expected host:port"),
        ("http://localhost:50051", "unknown scheme 'http'; known: tcp, ipc"),
        ("inproc://x", "unknown scheme 'inproc'"),
        ("ipc://relative/path", "absolute path"),
        ("ipc://", "absolute path"),
        ("ipc:///" + "x" * 107, "at most 107 bytes"),
        ("ipc:///" + "é" * 54, "at most 107 bytes"),
    ],
)
def test_other_addresses_are_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        parse(text)
    assert repr(text) in str(caught.value)


def test_the_longest_socket_path_is_accepted() -> None:
    path = "/" + "x" * 106
    assert parse(f"ipc://{path}") == Endpoint("ipc", path=path)


@settings(deadline=None)
@given(text=st.text() | st.text().map("tcp://{}:50051".format) | st.from_regex(r"\A(tcp://)?[a-z.\[\]:]*:[0-9]*\Z"))
@example("[]:1")
@example("[[:1")
def test_any_text_gives_an_endpoint_or_a_config_error(text: str) -> None:
    try:
        endpoint = parse(text)
    except ConfigError:
        return
    assert endpoint.path if endpoint.scheme in ("ipc", "shm") else endpoint.host and 0 < endpoint.port < 65536
    assert parse(endpoint.url).url == endpoint.url


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("localhost:1", True),
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("tcp://[::1]:1", True),
        ("ipc:///run/x", True),
        ("shm:///run/x", True),
        ("0.0.0.0:1", False),
        ("10.0.0.1:1", False),
        ("localhost.example.org:1", False),
        ("127.example.org:1", False),
        ("tcp://[::1234:1]:1", False),
    ],
)
def test_only_loopback_and_ipc_stay_on_this_machine(text: str, *, stays: bool) -> None:
    assert parse(text).stays_on_this_machine is stays
