"""Fixtures of the audit's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from audit_cases import TOKENS, Case, record
from tiny_models import random_ids


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: two that wait for each other on busy cores take five times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Case:
    return record(tiny_llama, random_ids(1, TOKENS)[0])
