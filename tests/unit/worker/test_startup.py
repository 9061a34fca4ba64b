"""Where a worker listens unless it is told, what it says while it loads codes, and which settings reach the engine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from workers import free_port, packed_tiny

from tsqp.arith import native, ring
from tsqp.config import WorkerConfig
from tsqp.errors import SetupError
from tsqp.transport.keys import create
from tsqp.transport.nearby import find_nearby
from tsqp.worker import server, startup
from tsqp.worker.products import Engine
from tsqp.worker.ranks.placement import placement
from tsqp.worker.services import WorkerService
from tsqp.worker.startup import Progress, _load_codes, open_worker


def listens(config: WorkerConfig) -> tuple[list[str], list[str]]:
    """Start and stop a worker; return its addresses and what it said."""
    notices: list[str] = []
    running = open_worker(config, Progress(notices.append, lambda _name, _done: None))
    running.transport.close()
    return [endpoint.url for endpoint in running.endpoints], notices


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path


def test_a_worker_that_is_not_told_where_listens_in_shared_memory_too(tiny_llama: Path, runtime: Path) -> None:
    port = free_port()
    config = WorkerConfig(model=str(tiny_llama), device="cpu", port=port)
    tcp, shm = f"tcp://127.0.0.1:{port}", f"shm://{runtime}/tsqp/worker-{port}"
    assert listens(config) == ([tcp, shm], [])
    assert listens(replace(config, listen=(tcp,))) == ([tcp], [])
    assert listens(replace(config, key=str(create(runtime, "worker")[1]))) == ([tcp], [])
    assert list((runtime / "tsqp").iterdir()) == []


def test_a_directory_that_is_not_private_leaves_the_port_alone_and_is_said(tiny_llama: Path, runtime: Path) -> None:
    port = free_port()
    (runtime / "tsqp").mkdir()
    (runtime / "tsqp").chmod(0o755)
    endpoints, (notice,) = listens(WorkerConfig(model=str(tiny_llama), device="cpu", port=port))
    assert endpoints == [f"tcp://127.0.0.1:{port}"]
    assert f"no shared memory, 127.0.0.1:{port} only: {runtime}/tsqp is not private to you" in notice


def test_a_dealer_has_no_shared_memory(tiny_llama: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setattr(startup, "DEALER_PORT", port)
    endpoints, _ = listens(WorkerConfig(model=str(tiny_llama), device="cpu", serves="masks"))
    assert endpoints == [f"tcp://127.0.0.1:{port}"]
    assert not (runtime / "tsqp").exists()


def test_a_second_worker_says_that_the_place_is_taken_and_leaves_the_first_its_socket(
    tiny_llama: Path, runtime: Path
) -> None:
    config = WorkerConfig(model=str(tiny_llama), device="cpu", port=free_port())
    first = open_worker(config, Progress(lambda _notice: None, lambda _name, _done: None))
    try:
        with pytest.raises(
            SetupError, match=f"worker-{config.port} is already in use by another process. Stop it or listen"
        ):
            listens(config)
        assert [path.name for path in (runtime / "tsqp").iterdir()] == [f"worker-{config.port}"]
        assert find_nearby(config.port)
        assert len(listens(replace(config, port=free_port()))[0]) == 2
    finally:
        first.transport.close()


def load_codes(packed: Path, progress: Progress) -> None:
    config = WorkerConfig(model=str(packed), serves="exact")
    with ExitStack() as stack:
        _load_codes(config, torch.device("cpu"), placement(config, {}), progress, stack)


@pytest.mark.parametrize("built", ["built", "missing"])
def test_missing_native_kernels_are_said_once(
    tiny_llama: Path, tmp_path: Path, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    monkeypatch.setattr(native, "kernels", lambda: native.Kernels("portable") if built == "built" else None)
    if built == "missing":
        monkeypatch.setattr(native, "_extension", None)
    notices: list[str] = []
    progress = Progress(notices.append, lambda _name, _done: None)
    load_codes(packed, progress)
    assert len(notices) == (built == "missing")
    assert all("install a C compiler" in notice for notice in notices)


def test_a_kernel_that_errs_is_said_with_the_one_that_serves(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    monkeypatch.setattr(native, "kernels", lambda: None)
    monkeypatch.setattr(native, "notice", lambda: None)
    monkeypatch.setattr(ring.LimbKernel, "multiply", lambda _self, _x, _codes, out_MN: out_MN.zero_())
    notices: list[str] = []
    progress = Progress(notices.append, lambda _name, _done: None)
    ring.tried.cache_clear()
    try:
        load_codes(packed, progress)
    finally:
        ring.tried.cache_clear()
    (notice,) = notices
    assert "cpu computes exact products by the float64 kernel, slower" in notice
    assert "int8 limbs: the int8 limbs kernel errs at" in notice


@pytest.mark.parametrize("asked", ["on", "off"])
def test_cuda_graphs_are_a_setting(
    tiny_llama: Path, tmp_path: Path, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    engine_for = server.engine_for

    def watched(service: WorkerService, *, cuda_graphs: bool) -> Engine:
        seen.append(cuda_graphs)
        return engine_for(service, cuda_graphs=cuda_graphs)

    monkeypatch.setattr(server, "engine_for", watched)
    config = WorkerConfig(
        model=str(tiny_llama), device="cpu", listen=(f"ipc://{tmp_path}/worker",), threads=1, cuda_graphs=asked
    )
    open_worker(config, Progress(lambda _text: None, lambda _name, _done: None)).transport.close()
    assert seen == [asked == "on"]
