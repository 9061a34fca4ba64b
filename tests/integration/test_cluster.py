"""Pools on a real Ray of two nodes on this machine: members are killed while requests run, scaled, and ended."""

from __future__ import annotations

import itertools
import os
import random
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_answers import Answer
from fake_engine import byte_tokenizer
from sites import PROMPT, Running, until
from workers import free_port

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import Finished
from tsqp.engine.directory import read
from tsqp.engine.opening import open_engine
from tsqp.errors import TransportError
from tsqp.levels import Model, open_model
from tsqp.transport import keys

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # none is written for who runs the tests

pytest.importorskip("ray")

import ray  # noqa: E402  it reads the environment
from ray.cluster_utils import Cluster  # noqa: E402

from tsqp.cluster.controller import PoolClient, PoolState  # noqa: E402
from tsqp.cluster.link import connected  # noqa: E402
from tsqp.cluster.scaling import Bounds  # noqa: E402
from tsqp.cluster.spec import PARTY_LABEL, PoolSpec, Wanted  # noqa: E402
from tsqp.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
WORKERS = 3


@dataclass
class Place:
    """A Ray cluster, and models and keys for its pools."""

    address: str
    floats: Path
    packed: Path
    directory: Path

    def key(self, name: str) -> tuple[str, str]:
        """Make a key; return its file, for a node, and its public text, for enclaves."""
        public, secret = keys.create(self.directory, name)
        return str(secret), keys.read_public(public).decode()
