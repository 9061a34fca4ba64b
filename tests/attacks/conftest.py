"""A tiny packed model, and enclaves over peers that lie (tests/hostile.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hostile import SETUPS, Material, Rig, build
from tiny_models import tiny_checkpoint
from torch import Tensor

from tsqp.model.pack import pack

BuildRig = Callable[..., Rig]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("attacks"))


@pytest.fixture(scope="session")
def material(checkpoint: Path) -> Material:
    """A tiny model's integer form: three layers, 101 tokens, every shape of its own but for equal layers."""
    out = checkpoint.parent / "attacks-packed"
    if not out.exists():
        pack(checkpoint, "tiny", out)
    return Material.read(out)


@pytest.fixture(scope="session")
def local_logits(material: Material) -> Tensor:
    """What every level must compute, to the bit: logits of ``PROMPT`` at every position."""
    return material.local_logits()


@pytest.fixture(params=SETUPS)
def rig(request: pytest.FixtureRequest, material: Material) -> Rig:
    """An enclave at `verified`, then at `masked` with each source of masks; pools are full."""
    return build(material, SETUPS[request.param], pool_rows=8)
