"""Fixtures for all tests: a cache of their own, the bundled model, and real worker processes."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from tiny_models import tiny_checkpoint
from transformers.utils import logging as transformers_logging
from workers import StartWorker, running_worker

from tsqp import logs
from tsqp.model.locate import BUNDLED, bundled_file, locate, locate_packed

# Property tests try the same inputs each time, so that a change is judged by what it changes, and for as long as they
# take: the machine may have other work. To look for more: HYPOTHESIS_PROFILE=random .venv/bin/pytest.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
transformers_logging.disable_progress_bar()
# A shell starts what runs in the background with Ctrl-C ignored, and commands under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep converted models and digests away from the user's own cache; child processes inherit it."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSQP_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """Keep sockets away from the user's own workers, in a directory with a short name; child processes inherit it."""
    with tempfile.TemporaryDirectory(prefix="tsqp-tests-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)


@pytest.fixture(scope="session")
def bundled_gguf() -> Path:
    return bundled_file()


@pytest.fixture(scope="session")
def bundled_directory(cache: Path, bundled_gguf: Path) -> Path:
    directory = locate(BUNDLED)
    assert directory.parent.parent == cache
    assert directory.name.startswith(bundled_gguf.stem)
    return directory


@pytest.fixture(scope="session")
def bundled_packed(bundled_directory: Path) -> Path:
    """The bundled model's int8 form, as the cache holds it."""
    assert bundled_directory.exists()
    return locate_packed(BUNDLED)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaMA without a tokenizer."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def worker() -> Iterator[StartWorker]:
    """Start workers on demand; one process per model, transport and options serves the whole session."""
    with ExitStack() as stack:
        started: dict[tuple[object, ...], str] = {}

        def start(directory: Path, scheme: str = "shm", **options: str) -> str:
            key = (directory, scheme, *sorted(options.items()))
            if key not in started:
                started[key] = stack.enter_context(running_worker(directory, scheme, **options))
            return started[key]

        yield start


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Undo what a command that ran in this process set up: it would write into the output of the next."""
    ours, root = logging.getLogger("tsqp"), logging.getLogger()
    levels = ours.level, root.level
    yield
    ours.setLevel(levels[0])
    root.setLevel(levels[1])
    for handler in [each for each in root.handlers if type(each).__module__ == logs.__name__]:
        root.removeHandler(handler)


@pytest.fixture(params=logs.FORMS)
def debug_logs(request: pytest.FixtureRequest, logs_as_before: None) -> str:  # noqa: ARG001  it undoes this
    """Log all that there is to standard error, as text or as JSON; tell which."""
    form: str = request.param
    logs.set_up("debug", form)
    return form
