"""Which weights are read while a worker waits: those of the groups that come next, in a model's order."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import load_linears, tiny_checkpoint

from tsqp.worker import ahead
from tsqp.worker.ahead import WeightsAhead
from tsqp.worker.services import OpenService


@pytest.fixture
def service(tmp_path: Path) -> OpenService:
    return OpenService(load_linears(tiny_checkpoint(tmp_path)), {})


def span_of(service: OpenService, group: str) -> tuple[int, int]:
    weights = service.weights(group)
    assert weights is not None
    return weights.data_ptr(), weights.nbytes


def test_groups_come_in_the_order_of_the_model(service: OpenService) -> None:
    reading = WeightsAhead(service)
    assert reading.span() == (0, 0)
    names = list(service.groups)
    for done, following in zip(names, [*names[1:], names[0]], strict=True):
        reading.after(done)
        assert reading.span() == span_of(service, following)


def test_what_was_read_is_not_read_again_and_the_next_group_follows(service: OpenService) -> None:
    reading = WeightsAhead(service)
    names = list(service.groups)
    reading.after(names[0])
    at, size = reading.span()
    reading.fetched(64)
    assert reading.span() == (at + 64, size - 64)
    reading.fetched(size - 64)
    assert reading.span() == span_of(service, names[2])


def test_no_more_is_read_than_a_cache_has_room_for(service: OpenService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LIMIT_BYTES", 1 << 10)
    reading = WeightsAhead(service)
    reading.after(next(iter(service.groups)))
    total = 0
    while size := reading.span()[1]:
        total += size
        reading.fetched(size)
    assert total == 1 << 10


def test_weights_in_a_layout_that_only_onednn_knows_are_not_read(
    service: OpenService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "weights", lambda _group: None)
    reading = WeightsAhead(service)
    reading.after(next(iter(service.groups)))
    assert reading.span() == (0, 0)
