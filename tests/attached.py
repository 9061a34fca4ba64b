"""A worker for attached models in the tests' own process: no sockets, every message noted, and told to lie at will."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import HostilePeer, laid_out

from tsqp.enclave import connect
from tsqp.model.linear_map import open_floats
from tsqp.model.linears import FloatGroups
from tsqp.model.packed import open_codes
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import ExactService, OpenService

CPU = torch.device("cpu")
ADDRESS = "127.0.0.1:1"


def peer_of(directory: Path, level: str, dtype: torch.dtype = torch.float32) -> HostilePeer:
    """Serve a linear map as ``tsqp worker`` would at a level."""
    if level == "open":
        weights = open_floats(directory)
        linears = FloatGroups(weights.groups, dtype, CPU)
        linears.fill(weights.read)
        return HostilePeer(ADDRESS, Dispatcher(OpenService(linears, {}), "map", weights.digest))
    codes = open_codes(directory)
    laid = laid_out({group.name: codes.read(group.name) for group in codes.groups})
    return HostilePeer(ADDRESS, Dispatcher(ExactService(codes.groups, laid, CPU), "map", codes.codes_digest))


def answer_with(peer: HostilePeer, patch: pytest.MonkeyPatch) -> str:
    """Let this peer be who answers from now on; return its address."""
    patch.setattr(connect, "open_client", lambda *_: peer.link())
    return ADDRESS
