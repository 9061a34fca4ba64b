"""Who is out of use for good."""

from __future__ import annotations

from dataclasses import replace

from tsqp.config import EnclaveConfig
from tsqp.engine.liars import Liars
from tsqp.errors import IntegrityError, PeerKeyError

LIAR = EnclaveConfig(worker="10.0.0.1:5000", worker_key="key")
ELSEWHERE = replace(LIAR, worker="10.0.0.2:5000")
WITH_ANOTHER_KEY = replace(LIAR, worker="tcp://10.0.0.1:5000", worker_key="other")
OTHER = EnclaveConfig(worker="10.0.0.3:5000")


def test_a_liar_is_known_by_its_place_and_by_its_key() -> None:
    liars = Liars()
    liars.add(LIAR, IntegrityError("wrong."))
    assert all(str(liars.why(each)) == "wrong." for each in (LIAR, ELSEWHERE, WITH_ANOTHER_KEY))
    assert liars.why(OTHER) is None


def test_who_does_not_hold_a_key_says_nothing_of_who_does() -> None:
    liars = Liars()
    liars.add(LIAR, PeerKeyError("another key."))
    assert str(liars.why(LIAR)) == "another key."
    assert liars.why(ELSEWHERE) is None


def test_where_dealers_may_have_lied_nobody_is_used() -> None:
    liars = Liars()
    liars.add_everybody(IntegrityError("wrong."))
    assert str(liars.why(OTHER)) == "wrong."
