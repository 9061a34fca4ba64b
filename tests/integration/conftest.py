"""Fixtures of tests in which an engine runs beside real workers that are lost, hang or lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hostile import Material
from sites import Site
from workers import packed_tiny


@pytest.fixture(scope="session")
def tiny_packed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's int8 form."""
    return packed_tiny(tiny_llama, tmp_path_factory.mktemp("packed") / "packed")


@pytest.fixture
def site(tiny_llama: Path, tiny_packed: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(Material.read(tiny_packed), tiny_llama, stack)
