"""Which workers an engine is given: their settings, one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tsqp.config import WORKER_LEVELS, EnclaveConfig, EngineConfig
from tsqp.errors import ConfigError
from tsqp.levels import check_peers
from tsqp.transport.urls import parse


def one_each(config: EnclaveConfig, engine: EngineConfig) -> tuple[EnclaveConfig, ...]:
    """Return the settings for each worker, in order; one without a worker where there is none.

    Raises:
        ConfigError: another number of keys than of workers, or one worker twice.
        TsqpError: an address, a key or a dealer cannot be used.
    """
    if config.level not in WORKER_LEVELS:
        return (config,)
    addresses = engine.workers or ((config.worker,) if config.worker else ())
    keys = engine.worker_keys or ((config.worker_key,) if config.worker_key else ())
    if keys and not addresses:
        raise ConfigError("a worker's key was given but no worker: give its address too (--worker).")
    if keys and len(keys) != len(addresses):
        raise ConfigError(
            f"{len(addresses)} workers and {len(keys)} worker keys: give one key for each, in order (--worker-key)."
        )
    if not addresses:
        return (config,)
    each = tuple(
        replace(config, worker=address, worker_key=key)
        for address, key in zip(addresses, keys or [None] * len(addresses), strict=True)
    )
    check_each(each)
    return each


def check_each(configs: Sequence[EnclaveConfig]) -> None:
    """Refuse workers that cannot work together, before anything is opened.

    Raises:
        ConfigError: there is none, one is there twice, or they differ in more than addresses and keys.
        TsqpError: an address, a key or a dealer cannot be used.
    """
    if not configs:
        raise ConfigError("no worker was given: an engine needs at least one.")
    places = [place(config) for config in configs]
    twice = next((config.worker for at, config in enumerate(configs) if places[at] in places[:at]), None)
    if twice is not None:
        raise ConfigError(f"the worker {twice} is given twice: once it had lied, it would be used again.")
    if len({shared(config) for config in configs}) > 1:
        raise ConfigError("the workers of one engine must have the same settings but for their addresses and keys.")
    for config in configs:
        check_peers(config.level, config)


def place(config: EnclaveConfig) -> str:
    """Return what names the place of a worker, however its address is written."""
    return parse(config.worker).url if config.worker else ""


def shared(config: EnclaveConfig) -> EnclaveConfig:
    """Return what the settings of all workers of one engine have in common."""
    return replace(config, worker=None, worker_key=None, dealers=("",) * len(config.dealers))
