"""Which worker a command uses: the one it is given, one of this user's that runs already, or one of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from tsqp.config import DEFAULT_PORT, WORKER_LEVELS, EnclaveConfig
from tsqp.errors import SetupError, TsqpError
from tsqp.transport.nearby import find_nearby
from tsqp.transport.urls import Endpoint, parse

if TYPE_CHECKING:
    from tsqp.levels import Model

Notice = Callable[[str], None]
Step = Callable[[str, float], None]


@contextmanager
def with_worker(
    config: EnclaveConfig, model: Model, threads: int, step: Step, notice: Notice
) -> Iterator[EnclaveConfig]:
    """Yield settings with a worker's address, for the time of a ``with`` block.

    Args:
        config: the settings; nothing is done at a level without a worker.
        model: what a worker must hold.
        threads: for a worker that is started.
        step: told the fraction done of a named step.
        notice: told in a sentence what the user should know.

    Raises:
        TsqpError: the worker's own, if one is started and does not come up.
    """
    from tsqp.launch import local_worker

    if config.level not in WORKER_LEVELS:
        yield config
    elif config.worker is not None:
        yield config if config.worker_key else replace(config, worker=nearest(config.worker, notice))
    elif not config.worker_key and (found := _running(config, model, step, notice)):
        yield replace(config, worker=found)
    else:
        step("starting a worker", 0.0)
        words = ["--model", str(model.directory), "--dtype", config.dtype, "--threads", str(threads)]
        with local_worker(words) as url:
            step("starting a worker", 1.0)
            yield replace(config, worker=url)


def nearest(address: str, notice: Notice) -> str:
    """Return where the worker at an address without a key is reached over shared memory; else the address as it is."""
    endpoint = parse(address)
    if endpoint.scheme != "tcp" or endpoint.ip != "127.0.0.1":
        return address
    found = _nearby(endpoint.port, notice)
    return found.url if found else address


def _running(config: EnclaveConfig, model: Model, step: Step, notice: Notice) -> str | None:
    """Return the address of a worker on the default port that serves this model at this level."""
    from tsqp.levels import check_worker

    found = _nearby(DEFAULT_PORT, notice)
    if found is None:
        return None
    try:
        check_worker(model, replace(config, worker=found.url), step)
    except TsqpError as error:
        notice(f"{error} Starting another worker for this run.")
        return None
    notice(f"using the worker at {found}.")
    return found.url


def _nearby(port: int, notice: Notice) -> Endpoint | None:
    try:
        return find_nearby(port)
    except SetupError as error:
        notice(f"no worker is looked for over shared memory: {error}")
        return None
