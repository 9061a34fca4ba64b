"""Reads what a worker holds of a model: float weights of a checkpoint, or the int8 codes of a packed model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsqp.arith import ring
from tsqp.model.architecture import LlamaConfig, read_config, weight_shapes
from tsqp.model.linears import memory_errors
from tsqp.model.locate import locate
from tsqp.model.packed import WorkerCodes
from tsqp.model.share import Share
from tsqp.model.weights import Checkpoint


def open_checkpoint(model: str, on_progress: Callable[[float], None] | None = None) -> tuple[LlamaConfig, Checkpoint]:
    """Find a model with float weights, and check that all its tensors are there.

    Args:
        model: as ``locate`` takes it.
        on_progress: called with the fraction converted, if it must be.

    Raises:
        WeightsError: there is no such model, or it is incomplete.
        UnsupportedModelError: it asks for what TSQP does not compute.
    """
    directory = locate(model, on_progress)
    architecture = read_config(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.require(weight_shapes(architecture))
    return architecture, checkpoint


def read_codes(
    packed: WorkerCodes, device: torch.device, share: Share, on_progress: Callable[[float], None]
) -> dict[str, ring.Codes]:
    """Read one rank's rows of all codes, and lay them out for a kernel that has been tried.

    Each group is checked against its digest, which is over all its rows: every rank hashes all, and keeps its own.

    Args:
        packed: the model.
        device: where the codes go.
        share: which rows.
        on_progress: called with the fraction read.

    Raises:
        WeightsError: codes were changed.
        DeviceMemoryError: the device cannot hold them.
    """
    codes = {}
    with memory_errors("loading", device):
        for done, group in enumerate(packed.groups):
            rows = None if share.is_whole else share.of(group.rows)
            codes[group.name] = ring.lay_out(packed.read(group.name, rows).to(device))
            on_progress((done + 1) / len(packed.groups))
    return codes
