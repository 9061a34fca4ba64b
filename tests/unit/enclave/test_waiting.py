"""A link that is given up: only where its peer does not answer, and nobody wants the answer."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import Mock

import pytest

from tsqp.enclave.waiting import LOOK_S, Impatient
from tsqp.errors import TransportError, TransportTimeoutError
from tsqp.transport.base import Delivery

HERE = Delivery([b"x"])
SILENCE = TransportTimeoutError("nothing came.")


def link(*heard: object) -> Mock:
    """A link that receives, or raises, one after the other."""
    return Mock(peer="gpu.example:50051", receive=Mock(side_effect=heard))


def waits(of: Mock) -> list[float]:
    return [call.args[0] for call in of.receive.call_args_list]


def test_what_has_come_is_taken_though_nobody_wants_it() -> None:
    given_up = Mock()
    assert Impatient(link(HERE), given_up).receive(60) is HERE
    given_up.assert_not_called()


def test_silence_is_given_up() -> None:
    silent = link(SILENCE, SILENCE, SILENCE)
    answers = iter([False, True])
    with pytest.raises(TransportError, match=r"gpu\.example:50051 did not answer") as raised:
        Impatient(silent, lambda: next(answers)).receive(60)
    assert waits(silent) == [LOOK_S, LOOK_S]
    assert type(raised.value) is TransportError  # no time-out, which is tried again


@pytest.mark.parametrize(("limit_s", "expected"), [(0.0, [0.0]), (0.25, [0.25]), (0.6, [0.25, 0.25, 0.1])])
def test_waiting_takes_as_long_as_it_may(limit_s: float, expected: list[float]) -> None:
    silent = link(*[SILENCE] * 3)
    with pytest.raises(TransportTimeoutError):
        Impatient(silent, lambda: False).receive(limit_s)
    assert waits(silent) == pytest.approx(expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda each: each.send([b"x"]),
        lambda each: each.allocate(5, kept=True),
        lambda each: each.discard(memoryview(b"")),
        lambda each: each.close(),
    ],
)
def test_all_else_is_the_links(use: Callable[[object], None]) -> None:
    plain, wrapped = Mock(), Mock()
    use(plain)
    use(Impatient(wrapped, lambda: True))
    assert wrapped.mock_calls == plain.mock_calls
