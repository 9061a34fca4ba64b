"""In which dtype activations travel at `open`: what it costs in accuracy, and what a worker does not take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import load_llama, random_ids
from torch import Tensor
from workers import running_worker

from tsqp.config import EnclaveConfig
from tsqp.enclave.session import Expected, check_peer
from tsqp.errors import ConfigError, ModelMismatchError
from tsqp.levels import open_model, runnable
from tsqp.wire import messages

# Relative error of the logits. A number is off by half a unit of 8, 11 or 24 bits of significand, or half of 1/127 of a
# token's largest; some thirty roundings in a row add up like their root, and a tiny random model amplifies them.
LIMITS = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2, "int8": 1e-1}


def logits(directory: Path, url: str, ids_BT: Tensor, wire_dtype: str | None) -> tuple[Tensor, int]:
    model = open_model(str(directory), "open")
    with runnable("open", model, EnclaveConfig(worker=url, wire_dtype=wire_dtype)) as loaded:
        assert loaded.predict_all
        every = loaded.predict_all(ids_BT)
        return every, loaded.meter.bytes_sent + loaded.meter.bytes_received


@pytest.mark.parametrize("scheme", ["shm", "ipc"])
def test_error_and_bytes_of_every_wire_dtype(tiny_llama: Path, scheme: str) -> None:
    ids_BT = random_ids(2, 40)
    exact = load_llama(tiny_llama).prefill(ids_BT, all_logits=True)
    with running_worker(tiny_llama, scheme) as url:
        found = {name: logits(tiny_llama, url, ids_BT, name) for name in LIMITS}
        default, _ = logits(tiny_llama, url, ids_BT, None)
    assert torch.equal(default, found["float32"][0])
    errors = {name: float((each - exact).norm() / exact.norm()) for name, (each, _) in found.items()}
    assert all(errors[name] < limit for name, limit in LIMITS.items()), errors
    assert errors["float32"] < errors["float16"] < errors["bfloat16"] < errors["int8"]
    moved = {name: count for name, (_, count) in found.items()}
    assert moved["int8"] < 0.8 * moved["float16"] < 0.5 * moved["float32"]
    assert abs(moved["float16"] - moved["bfloat16"]) < 100, "names differ in length, nothing else does"


def test_a_wire_dtype_that_the_worker_lacks_is_refused() -> None:
    expected = Expected(serves="open", digest="d", dtype="float32", groups=(), wire_dtype="int8")
    welcome = messages.Welcome(
        id=1, software="other", instance="i", serves="open", model="m", model_digest="d", device="cpu", dtype="float32",
        module_count=0, groups=(), wire_dtypes=("float32",),
    )  # fmt: skip
    with pytest.raises(ModelMismatchError, match="takes activations as float32, this side would send int8"):
        check_peer(welcome, expected, "here")


@pytest.mark.parametrize(("level", "offload"), [("local", False), ("open", True)])
def test_where_int8_means_nothing_it_is_refused(tiny_llama: Path, level: str, offload: bool) -> None:  # noqa: FBT001
    model = open_model(str(tiny_llama), level)
    config = EnclaveConfig(worker="tcp://127.0.0.1:1", wire_dtype="int8")
    with pytest.raises(ConfigError, match="wire-dtype"), runnable(level, model, config, offload_attention=offload):
        pass
