"""A word that the worker can see lying in a slot is stored once, finished; no kernel uses a slot as scratch memory.

A process that samples the region (test_slots_hold_finished_words.py) may miss what lies there for a microsecond. Here
each operation of PyTorch that stores something in a slot is counted, and each address that a native kernel is given is
looked at.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attacks.slots import IDS, LIMIT_BYTES, Counted, Kernels, Slots, Stores, worker
from hostile import Material

from tsqp.arith import native
from tsqp.config import EnclaveConfig
from tsqp.levels import Model, runnable
from tsqp.transport.urls import parse


@pytest.mark.parametrize("retries", [0, 1])
def test_each_word_in_a_slot_is_stored_once(
    material: Material, tmp_path: Path, retries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots()
    kernels = Kernels(native._extension, slots)
    if native._extension:
        monkeypatch.setattr(native, "_extension", kernels)
    endpoint = parse(f"shm://{tmp_path}/worker")
    model = Model(material.directory, material.packed.config, None, material.packed)
    config = EnclaveConfig(worker=endpoint.url, max_message_bytes=LIMIT_BYTES, mask_pool=0, retries=retries)
    with (
        worker(material, endpoint),
        runnable("masked", model, config, wrap=lambda _peer: lambda link: Counted(link, slots)) as loaded,
        Stores(slots),
    ):
        assert loaded.predict_all is not None
        loaded.predict_all(IDS)
    assert len(slots.ended) > 4
    assert set(slots.ended) == {(1, 1, ("aten.add.out",))}
    assert not native.kernels() or {"quantize", "dots"} <= kernels.called
