"""The tiny model that targets compute with: random weights, written to a directory of its own."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tsqp.arith.ring import Codes, lay_out
from tsqp.model.architecture import LinearGroup, linear_groups, read_config
from tsqp.model.linears import Linears
from tsqp.model.ops import read_state
from tsqp.model.pack import pack
from tsqp.model.packed import open_codes
from tsqp.model.weights import Checkpoint
from tsqp.worker.services import DealerService, ExactService, OpenService

TINY: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@cache
def scratch() -> Path:
    """Return a directory that ends with this process; libFuzzer's, which ends at once, leave it to ``fuzz.run``."""
    path = Path(tempfile.mkdtemp(prefix="tsqp-fuzz-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@cache
def directory() -> Path:
    """Write the model; return its directory."""
    from tiny_models import tiny_checkpoint  # noqa: PLC0415  transformers takes seconds to load

    return tiny_checkpoint(scratch() / "model", **TINY)


@cache
def packed() -> Path:
    """Pack the model; return the packed directory."""
    out = scratch() / "packed"
    pack(directory(), "tiny", out)
    return out


@cache
def open_linears() -> Linears:
    """Return the model's weights in floats."""
    return Linears(read_config(directory()), Checkpoint(directory()), torch.float32, torch.device("cpu"))


@cache
def open_service() -> OpenService:
    """Return a worker's products in floats."""
    return OpenService(open_linears(), read_state(open_linears(), Checkpoint(directory())))


@cache
def exact_service() -> ExactService:
    """Return a worker's products of int8 codes."""
    return ExactService(*_codes())


@cache
def dealer_service() -> DealerService:
    """Return a dealer's products of masks."""
    return DealerService(*_codes())


def _codes() -> tuple[tuple[LinearGroup, ...], dict[str, Codes], torch.device]:
    codes = open_codes(packed())
    groups = linear_groups(open_linears().config)
    return groups, {group.name: lay_out(codes.read(group.name)) for group in groups}, torch.device("cpu")
