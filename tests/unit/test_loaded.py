"""Into how many parts steps of generation are cut."""

from __future__ import annotations

import pytest

from tsqp.config import EnclaveConfig
from tsqp.loaded import step_groups


@pytest.mark.parametrize(
    ("micro_batches", "shared_cores", "groups"),
    [(None, True, 1), (None, False, 2), (1, False, 1), (2, True, 2), (3, False, 3)],
)
def test_a_step_has_two_groups_in_flight_unless_the_worker_has_the_same_cores(
    micro_batches: int | None,
    shared_cores: bool,  # noqa: FBT001
    groups: int,
) -> None:
    assert step_groups(EnclaveConfig(micro_batches=micro_batches), shared_cores=shared_cores) == groups
