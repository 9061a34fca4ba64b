"""Loads a model at any level, ready to predict: where the levels differ, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tsqp.arith import native
from tsqp.config import EXACT_LEVELS, EnclaveConfig
from tsqp.enclave.codes import CodesSource, DirectoryCodes, StreamedCodes, read_codes
from tsqp.enclave.connect import Peer, Wrap, connect, meet, meet_again
from tsqp.enclave.dealers import check_dealers, dealer_peers, met_dealers
from tsqp.enclave.mask_pool import MaskPool, check_pool_fits
from tsqp.enclave.mask_refill import IdleRefill
from tsqp.enclave.mask_sources import EnclaveMasks, MaskSource
from tsqp.enclave.masks import MaskLedger
from tsqp.enclave.products import CheckedProducts, ExactWorker
from tsqp.enclave.session import Expected, Session
from tsqp.errors import ConfigError, InputError
from tsqp.meter import Meter
from tsqp.model.architecture import LlamaConfig, linear_groups, read_config, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.exact import ExactOps, LocalProducts
from tsqp.model.linears import Linears
from tsqp.model.llama import Llama, Rows
from tsqp.model.locate import is_packed_model, locate, locate_packed
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.overlap import micro_batches
from tsqp.model.packed import PackedEnclave, open_enclave
from tsqp.model.tokenizer import Tokenizer, find_tokenizer, read_companions
from tsqp.model.weights import Checkpoint
from tsqp.threads import using_threads
from tsqp.transport.keys import load_public
from tsqp.transport.urls import parse
from tsqp.wire import codec
from tsqp.wire.messages import Welcome

# Between two replies the enclave's other threads sleep. Waking one costs some 0.1 ms, as much as a whole operation on
# this many tokens; attention, the largest, gains from a second thread above it (docs/performance.md).
_TOKENS_WORTH_THREADS = 256

# Smaller micro-batches read the weights more often and multiply less each time; more of them hide more of a slow link.
_TOKENS_PER_MICRO_BATCH = 64
_MOST_MICRO_BATCHES = 8

Predict = Callable[[Tensor], Tensor]
OnStep = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a level needs it: its directory and, for integer levels, the enclave's checked part of it."""

    directory: Path
    architecture: LlamaConfig
    tokenizer: Tokenizer | None
    packed: PackedEnclave | None


def open_model(name: str, level: str, on_step: OnStep = lambda _name, _done: None) -> Model:
    """Find a model and read what is needed before anything is loaded.

    Args:
        name: ``smollm2``, a Hugging Face directory, a .gguf file or a packed model.
        level: the level it is for; `verified` and `masked` pack a plain model into the cache.
        on_step: told the fraction done of a named step.

    Raises:
        SetupError: the model is missing, damaged, or of the wrong kind for the level.
    """
    if level in EXACT_LEVELS or (level == "local" and is_packed_model(name)):
        directory = locate_packed(name, lambda done: on_step("packing the model", done))
        packed = open_enclave(directory)
        companions = read_companions(packed.directory, packed.manifest.files)
        tokenizer = Tokenizer(packed.tokenizer_json, companions=companions) if packed.tokenizer_json else None
        return Model(directory, packed.config, tokenizer, packed)
    directory = locate(name, lambda done: on_step("converting the model", done))
    return Model(directory, read_config(directory), find_tokenizer(directory), None)


@dataclass(frozen=True, slots=True)
class Stepper:
    """Computes steps of generation.

    Attributes:
        llama: the model.
        groups: into how many parts a step is cut that take turns.
        own_products: whether this process computes the products, and so needs all its threads.
        pool: masks, at `masked`.
        paused: during a ``with`` block the pool is not filled.
        reopen: opens the link to the worker again if it was lost.
    """

    llama: Llama
    groups: int = 1
    own_products: bool = False
    pool: MaskPool | None = None
    paused: Callable[[], AbstractContextManager[None]] = nullcontext
    reopen: Callable[[], None] = lambda: None

    def run(self, parts: Sequence[Rows]) -> list[Tensor]:
        """See ``Llama.run``."""
        rows = max(len(part.ids_M) for part in parts)
        few = rows < _TOKENS_WORTH_THREADS and not self.own_products
        with self.paused(), using_threads(1) if few else nullcontext():
            return self.llama.run(parts)


@dataclass(frozen=True, slots=True)
class Runnable:
    """A model ready to predict: ids (B, T) to last-position logits (B, V), and what it costs.

    ``predict_all`` gives logits at every position, (B, T, V); the monolithic baseline has none. ``micro_batches`` tells
    into how many parts prompts are cut that take turns. ``prepare`` waits until the mask pool is full, where there is
    one, and is told where to report progress. ``stepper`` is for generation; the baseline has none.
    """

    predict: Predict
    meter: Meter
    predict_all: Predict | None = None
    micro_batches: Callable[[Tensor], int] = lambda _ids_BT: 1
    prepare: Callable[[Callable[[float], None]], None] = lambda _on_progress: None
    stepper: Stepper | None = None


@contextmanager
def runnable(
    level: str,
    model: Model,
    config: EnclaveConfig,
    *,
    offload_attention: bool = False,
    wrap: Callable[[str], Wrap] | None = None,
    on_step: OnStep = lambda _name, _done: None,
    on_notice: Callable[[str], None] = warnings.warn,
) -> Iterator[Runnable]:
    """Load a model at a level for the time of a ``with`` block.

    Args:
        level: one of ``config.LEVELS``.
        model: from ``open_model`` for this level.
        config: dtype, timeouts, peers, masks; ``worker`` is set where the level needs one.
        offload_attention: also send attention's products to the worker; `open` only.
        wrap: given a peer's name (``worker``, ``dealer 1``), returns what to wrap its transport in; for the audit.
        on_step: told the fraction done of a named step.
        on_notice: told in a sentence what the user should know; by default a warning.

    Raises:
        TsqpError: as loading or connecting does.
    """
    check_options(level, config, offload_attention=offload_attention)
    wrap_worker = wrap("worker") if wrap else None
    if level == "monolithic":
        from tsqp.bench.monolithic import Monolithic  # noqa: PLC0415  transformers is needed by this level only

        yield Runnable(Monolithic(model.directory, codec.TORCH_DTYPES[config.dtype]), Meter())
    elif level == "local":
        yield _local(model, config, on_step)
    else:
        worker = _worker_peer(config, level, wrap_worker)
        if level == "open":
            with _open(model, config, worker, on_step, offload_attention=offload_attention) as loaded:
                yield loaded
        else:
            dealers = _dealers(config, level, wrap)
            with _checked(model, config, worker, dealers, on_step, on_notice) as loaded:
                yield loaded


def check_options(level: str, config: EnclaveConfig, *, offload_attention: bool) -> None:
    """Refuse settings that a level would ignore: who asks for masks must not get a weaker level without being told.

    Raises:
        ConfigError: there is one.
    """
    of_masked = {
        "--masks": config.masks,
        "--dealer": config.dealers,
        "--dealer-key": config.dealer_keys,
        "--mask-pool": config.mask_pool,
    }
    asked = next((name for name, value in of_masked.items() if value), None)
    if asked and level != "masked":
        raise ConfigError(
            f"{asked} is for the level masked, this run is at {level}: add --level masked or leave it out."
        )
    if config.codes and level not in (*EXACT_LEVELS, "local"):
        raise ConfigError(f"--codes is for the levels verified, masked and local, this run is at {level}.")
    if offload_attention and level != "open":
        raise ConfigError(f"--offload-attention is for the level open, this run is at {level}.")
    if config.wire_dtype and level != "open":
        raise ConfigError(f"--wire-dtype is for the level open, this run is at {level}.")
    if offload_attention and config.wire_dtype == "int8":
        raise ConfigError("--offload-attention and --wire-dtype int8 exclude each other: scales are of tokens.")


def _worker_peer(config: EnclaveConfig, level: str, wrap: Wrap | None) -> Peer:
    if config.worker is None:
        raise InputError(f"the level {level!r} needs a worker's address.")
    return Peer(
        address=config.worker, key=load_public(config.worker_key) if config.worker_key is not None else None, wrap=wrap
    )


def _dealers(config: EnclaveConfig, level: str, wrap: Callable[[str], Wrap] | None) -> tuple[Peer, ...] | None:
    """Return the dealers of a `masked` run, none for the enclave's own masks; None where nothing is masked."""
    if level != "masked":
        return None
    if config.masks == "enclave" and config.dealers:
        raise ConfigError("masks by the enclave and dealers exclude each other: leave out --masks enclave or --dealer.")
    if config.masks == "dealers" and not config.dealers:
        raise ConfigError("--masks dealers needs at least one --dealer.")
    peers = dealer_peers(config, load_public)
    if wrap is None:
        return peers
    return tuple(replace(peer, wrap=wrap(f"dealer {number}")) for number, peer in enumerate(peers, 1))


def _local(model: Model, config: EnclaveConfig, on_step: OnStep) -> Runnable:
    """Compute everything here: in floats, or over a packed model in exact integers."""
    meter = Meter()
    if model.packed is not None:
        source = DirectoryCodes(Path(config.codes) if config.codes else model.directory)
        checks = read_codes(
            model.packed.manifest, source, keep=True, on_progress=lambda done: on_step("reading the codes", done)
        )
        products = LocalProducts(checks.codes, torch.get_num_threads())
        llama = Llama(model.architecture, ExactOps(model.packed, products, meter))
        loaded = _in_turns(llama, meter, _cutting(config, shared_cores=True))
        return replace(loaded, stepper=Stepper(llama))
    checkpoint = Checkpoint(model.directory)
    checkpoint.require(weight_shapes(model.architecture))
    linears = Linears(
        model.architecture,
        checkpoint,
        codec.TORCH_DTYPES[config.dtype],
        torch.device("cpu"),
        lambda done: on_step("loading the weights", done),
    )
    llama = Llama(model.architecture, LocalOps(linears, read_state(linears, checkpoint)))
    stepper = Stepper(llama, own_products=True)
    return Runnable(llama.prefill, meter, partial(llama.prefill, all_logits=True), stepper=stepper)


@contextmanager
def _open(
    model: Model, config: EnclaveConfig, worker: Peer, on_step: OnStep, *, offload_attention: bool
) -> Iterator[Runnable]:
    checkpoint = Checkpoint(model.directory)
    checkpoint.require(weight_shapes(model.architecture))
    digest = model_digest(model.architecture, checkpoint, lambda done: on_step("hashing the weights", done))
    meter = Meter()
    with ExitStack() as links:
        link = links.enter_context(connect(worker, config, model.architecture, digest, meter))
        llama = Llama(model.architecture, link.ops, offload_attention=offload_attention)

        def reopen() -> None:
            links.close()
            llama.use(links.enter_context(connect(worker, config, model.architecture, digest, meter)).ops)

        shared = _shares_cores(worker, link.welcome)
        loaded = _in_turns(llama, meter, _cutting(config, shared_cores=shared))
        yield replace(loaded, stepper=Stepper(llama, groups=_groups(config, shared_cores=shared), reopen=reopen))


@contextmanager
def _checked(
    model: Model,
    config: EnclaveConfig,
    worker: Peer,
    dealers: tuple[Peer, ...] | None,
    on_step: OnStep,
    on_notice: Callable[[str], None],
) -> Iterator[Runnable]:
    """Run `verified` (``dealers`` None) or `masked`."""
    if model.packed is None:
        raise InputError("the integer levels need a packed model.")
    packed, meter, groups = model.packed, Meter(), linear_groups(model.architecture)
    threads, by_enclave = torch.get_num_threads(), dealers == ()
    if dealers is not None:
        check_pool_fits(groups, config.mask_pool or 0, config.mask_memory)
    if dealers:
        check_dealers(worker, dealers, on_notice)
    slower = native.notice()
    if slower:
        on_notice(slower)
    with ExitStack() as stack:
        expected = Expected(serves="exact", digest=packed.manifest.codes_digest, dtype="int8", groups=groups)
        instances: dict[str, str] = {}
        welcomes: list[Welcome] = []

        def open_session() -> Session:
            session, welcome = (meet_again if welcomes else meet)(worker, config, expected, meter)
            instances[welcome.instance] = "the worker"
            welcomes.append(welcome)
            return session

        exact = ExactWorker(open_session, {group.name: group for group in groups}, config.retries)
        stack.callback(exact.close)
        codes: CodesSource = DirectoryCodes(Path(config.codes)) if config.codes else StreamedCodes(exact.session)
        checks = read_codes(
            packed.manifest, codes, keep=by_enclave, on_progress=lambda done: on_step("reading the codes", done)
        )
        pool, refill = None, None
        if dealers is not None:
            source: MaskSource = EnclaveMasks(groups, checks.codes, threads)
            if dealers:
                met = met_dealers(dealers, config, model.architecture, packed.manifest.codes_digest, instances)
                source = stack.enter_context(met)
            pool = MaskPool(groups, source, MaskLedger(), config.mask_pool or 0, config.mask_memory, meter)
            refill = IdleRefill(pool, threads, meter)
            stack.callback(refill.close)
        products = CheckedProducts(exact, checks.checkers, pool, meter)
        llama = Llama(model.architecture, ExactOps(packed, products, meter))
        shared = _shares_cores(worker, welcomes[0])
        stepper = Stepper(
            llama,
            groups=_groups(config, shared_cores=shared),
            pool=pool,
            paused=refill.paused if refill else nullcontext,
            reopen=exact.open_again,
        )
        loaded = replace(_in_turns(llama, meter, _cutting(config, shared_cores=shared)), stepper=stepper)
        yield _with_refill(loaded, refill) if refill else loaded


def _shares_cores(worker: Peer, welcome: Welcome) -> bool:
    """Tell whether the worker computes on the cores that this process runs on. By its own account: it is for speed."""
    return welcome.device == "cpu" and parse(worker.address).stays_on_this_machine


def _cutting(config: EnclaveConfig, *, shared_cores: bool) -> Callable[[Tensor], int]:
    """Return into how many micro-batches prompts are cut: what the user says, else by their length.

    One where the worker shares this process's cores: then it has nothing to do while this process computes for another
    micro-batch, but neither is there a core that waits.
    """

    def count(ids_BT: Tensor) -> int:
        best = 1 if shared_cores else min(_MOST_MICRO_BATCHES, max(1, ids_BT.numel() // _TOKENS_PER_MICRO_BATCH))
        return len(micro_batches(ids_BT.shape[0], ids_BT.shape[1], config.micro_batches or best))

    return count


def _groups(config: EnclaveConfig, *, shared_cores: bool) -> int:
    """Return into how many parts a step of generation is cut; see ``_cutting``."""
    return config.micro_batches or (1 if shared_cores else 2)


def _in_turns(model: Llama, meter: Meter, cut: Callable[[Tensor], int]) -> Runnable:
    """Run prefills in micro-batches, with one thread where these are too small to wake others for.

    `local` over a packed model does so too, but for its products: attention's last bits depend on how a prompt is cut
    and on the number of threads, and the integer levels give the same bits for the same number of micro-batches.
    """

    def predict(ids_BT: Tensor, *, all_logits: bool = False) -> Tensor:
        parts = cut(ids_BT)
        small = ids_BT.numel() // parts < _TOKENS_WORTH_THREADS
        with using_threads(1) if small else nullcontext():
            return model.prefill(ids_BT, all_logits=all_logits, parts=parts)

    return Runnable(predict, meter, partial(predict, all_logits=True), cut)


def _with_refill(model: Runnable, refill: IdleRefill) -> Runnable:
    """Fill the pool between predictions and not during them."""

    def paused(predict: Predict) -> Predict:
        def run(ids_BT: Tensor) -> Tensor:
            with refill.paused():
                return predict(ids_BT)

        return run

    predict_all = paused(model.predict_all) if model.predict_all else None
    return replace(model, predict=paused(model.predict), predict_all=predict_all, prepare=refill.wait_until_full)


def with_all_logits(model: Runnable) -> Runnable:
    """Return a model that computes the head at every position and hands out the last one's logits.

    Raises:
        InputError: the baseline, which has no such way.
    """
    predict_all = model.predict_all
    if predict_all is None:
        raise InputError("the monolithic baseline computes the head at the last position only.")
    return replace(model, predict=lambda ids_BT: predict_all(ids_BT)[:, -1])
