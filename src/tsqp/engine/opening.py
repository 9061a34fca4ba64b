"""Puts an engine together: its model, its workers, the memory they may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial

from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.addresses import one_each
from tsqp.engine.directory import Follower, first_workers
from tsqp.engine.loop import GenerationEngine
from tsqp.engine.memory import mask_room, memory
from tsqp.engine.workers import Revive, Workers
from tsqp.errors import WeightsError
from tsqp.levels import Model
from tsqp.loaded import OnStep


@contextmanager
def open_engine(
    model: Model,
    config: EnclaveConfig,
    settings: EngineConfig | None = None,
    *,
    on_step: OnStep = lambda _name, _done: None,
    on_notice: Callable[[str], None] = lambda _sentence: None,
    revive: Revive | None = None,
) -> Iterator[GenerationEngine]:
    """Load a model at its level and run an engine for the time of a ``with`` block.

    Args:
        model: from ``levels.open_model``.
        config: level, worker, masks.
        settings: workers, memory, numbers of requests; by default one worker, that of ``config``.
        on_step: told the fraction done of a named step.
        on_notice: told in a sentence what the user should know, also later, when another worker is used.
        revive: see ``Workers``.

    Raises:
        TsqpError: as loading or connecting does, where no worker can be used.
        WeightsError: the model has no tokenizer.
        ConfigError: the level cannot generate, or the settings do not fit together.
    """
    if model.tokenizer is None:
        raise WeightsError("a model without tokenizer.json cannot generate text.")
    settings = settings or EngineConfig()
    memory(model.architecture, config, settings)  # refuses what does not fit before anybody is met
    reuse = settings.reuse_prefixes or ("off" if config.level == "masked" else "on")
    with ExitStack() as stack:
        configs = first_workers(config, settings) if settings.directory else one_each(config, settings)
        workers = Workers(
            model,
            configs,
            partial(mask_room, model.architecture, config, settings),
            settings.worker_rows,
            on_notice,
            revive,
        )
        stack.enter_context(closing(workers))
        workers.open(on_step)
        engine = GenerationEngine(workers, model.architecture, model.tokenizer, settings, reuse_prefixes=reuse == "on")
        stack.enter_context(closing(engine))
        if settings.directory:
            stack.enter_context(closing(Follower(config, settings, configs, workers)))
        yield engine
