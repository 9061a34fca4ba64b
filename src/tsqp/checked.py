"""`verified` and `masked`: every product by the worker is checked, and at `masked` it sees uniform words only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tsqp.arith import native
from tsqp.arith.ring import Codes
from tsqp.config import EnclaveConfig
from tsqp.enclave.codes import Checks, CodesSource, DirectoryCodes, StreamedCodes, read_codes
from tsqp.enclave.connect import Peer, meet, meet_again
from tsqp.enclave.dealers import check_dealers, met_dealers
from tsqp.enclave.mask_pool import MaskPool, check_pool_fits
from tsqp.enclave.mask_refill import IdleRefill
from tsqp.enclave.mask_sources import EnclaveMasks, MaskSource
from tsqp.enclave.masks import MaskLedger
from tsqp.enclave.products import CheckedProducts, ExactWorker
from tsqp.enclave.session import Expected, Session
from tsqp.loaded import OnStep, Predict, Runnable, Stepper, cutting, shares_cores, step_groups, taking_turns
from tsqp.meter import Meter
from tsqp.model.architecture import linear_groups
from tsqp.model.exact import ExactOps
from tsqp.model.llama import Llama
from tsqp.model.packed import PackedEnclave
from tsqp.wire.messages import Welcome


@contextmanager
def checked(
    packed: PackedEnclave,
    config: EnclaveConfig,
    worker: Peer,
    dealers: tuple[Peer, ...] | None,
    on_step: OnStep,
    on_notice: Callable[[str], None],
    *,
    kept: dict[str, Codes],
) -> Iterator[Runnable]:
    """Load `verified` or `masked` for the time of a ``with`` block.

    Every secret is drawn anew: vectors of the checks, mask keys, the pool.

    Args:
        packed: the enclave's part of the model.
        config: timeouts, masks, where the codes are.
        worker: multiplies.
        dealers: make masks; none for the enclave's own, None for `verified`.
        on_step: told the fraction done of a named step.
        on_notice: told in a sentence what the user should know.
        kept: this model's codes as far as they have been read, for masks by the enclave; what is missing is added.

    Raises:
        TsqpError: as loading or connecting does.
    """
    meter, groups = Meter(), linear_groups(packed.config)
    _check_settings(packed, config, worker, dealers, on_notice)
    with ExitStack() as stack:
        link = _WorkerLink(worker, config, packed, meter)
        exact = ExactWorker(link.open, {group.name: group for group in groups}, config.retries)
        stack.callback(exact.close)
        codes: CodesSource = DirectoryCodes(Path(config.codes)) if config.codes else StreamedCodes(exact.session)
        checks = read_codes(
            packed.manifest,
            codes,
            kept if dealers == () else None,
            on_progress=lambda done: on_step("reading the codes", done),
        )
        pool, refill = None, None
        if dealers is not None:
            source = stack.enter_context(_mask_source(packed, config, dealers, checks, link))
            pool = MaskPool(groups, source, MaskLedger(), config.mask_pool or 0, config.mask_memory, meter)
            refill = stack.enter_context(closing(IdleRefill(pool, torch.get_num_threads(), meter)))
        products = CheckedProducts(exact, checks.checkers, pool, meter)
        llama = Llama(packed.config, ExactOps(packed, products, meter))
        shared = shares_cores(worker, link.welcomes[0])

        stepper = Stepper(
            llama,
            groups=step_groups(config, shared_cores=shared),
            pool=pool,
            paused=refill.paused if refill else nullcontext,
            reopen=exact.open_again,
            lose=exact.lose,
            look=lambda: exact.look(config.connect_timeout_s),
            check=refill.check if refill else lambda: None,
        )
        loaded = replace(taking_turns(llama, meter, cutting(config, shared_cores=shared)), stepper=stepper)
        yield _with_refill(loaded, refill) if refill else loaded


def expected_worker(packed: PackedEnclave) -> Expected:
    """Return what a worker must say that multiplies for an integer level."""
    groups = linear_groups(packed.config)
    return Expected(serves="exact", digest=packed.manifest.codes_digest, dtype="int8", groups=groups)


def _check_settings(
    packed: PackedEnclave,
    config: EnclaveConfig,
    worker: Peer,
    dealers: tuple[Peer, ...] | None,
    on_notice: Callable[[str], None],
) -> None:
    """Refuse what cannot work before anybody is met."""
    if dealers is not None:
        check_pool_fits(linear_groups(packed.config), config.mask_pool or 0, config.mask_memory)
    if dealers:
        check_dealers(worker, dealers, on_notice)
    slower = native.notice()
    if slower:
        on_notice(slower)


class _WorkerLink:
    """How the link to a worker is opened, the first time and when it was lost; who was met is noted."""

    def __init__(self, worker: Peer, config: EnclaveConfig, packed: PackedEnclave, meter: Meter) -> None:
        self.welcomes: list[Welcome] = []
        self._worker, self._config, self._meter = worker, config, meter
        self._expected = expected_worker(packed)

    def open(self) -> Session:
        """Connect; a worker that was there before has some time to come back."""
        session, welcome = (meet_again if self.welcomes else meet)(
            self._worker, self._config, self._expected, self._meter
        )
        self.welcomes.append(welcome)
        return session


@contextmanager
def _mask_source(
    packed: PackedEnclave, config: EnclaveConfig, dealers: tuple[Peer, ...], checks: Checks, link: _WorkerLink
) -> Iterator[MaskSource]:
    if not dealers:
        yield EnclaveMasks(linear_groups(packed.config), checks.codes, torch.get_num_threads())
        return
    seen = {welcome.instance: "the worker" for welcome in link.welcomes}
    with met_dealers(dealers, config, packed.config, packed.manifest.codes_digest, seen) as source:
        yield source


def _with_refill(model: Runnable, refill: IdleRefill) -> Runnable:
    """Fill the pool between predictions and not during them."""

    def paused(predict: Predict) -> Predict:
        def run(ids_BT: Tensor) -> Tensor:
            with refill.paused():
                return predict(ids_BT)

        return run

    predict_all = paused(model.predict_all) if model.predict_all else None
    return replace(model, predict=paused(model.predict), predict_all=predict_all, prepare=refill.wait_until_full)
