"""Loads a model at any level, ready to predict: where the levels differ, and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from tsqp.arith.ring import Codes
from tsqp.checked import checked, expected_worker
from tsqp.config import EXACT_LEVELS, EnclaveConfig
from tsqp.enclave.codes import DirectoryCodes, read_codes
from tsqp.enclave.connect import Peer, Wrap, check_peer_link, connect, expected_open, meet
from tsqp.enclave.dealers import check_dealers, dealer_peers
from tsqp.enclave.session import Expected
from tsqp.errors import ConfigError, InputError, ModelMismatchError, printable
from tsqp.loaded import OnStep, Runnable, Stepper, cutting, shares_cores, step_groups, taking_turns
from tsqp.meter import Meter
from tsqp.model.architecture import LlamaConfig, read_config, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.exact import ExactOps, LocalProducts
from tsqp.model.linears import Linears
from tsqp.model.llama import Llama
from tsqp.model.locate import is_packed_model, locate, locate_packed
from tsqp.model.ops import LocalOps, read_state
from tsqp.model.packed import PackedEnclave, open_enclave
from tsqp.model.tokenizer import Tokenizer, find_tokenizer, read_companions
from tsqp.model.weights import Checkpoint
from tsqp.transport.keys import KeyPair, load_public, load_secret
from tsqp.transport.urls import parse
from tsqp.wire import codec


@dataclass(frozen=True, slots=True)
class Model:
    """A model as a level needs it: its directory and, for integer levels, the enclave's checked part of it.

    ``codes`` are those that have been read and compared with the manifest, for products in this process. All levels
    that are open at the same time share them; nothing of them is secret.
    """

    directory: Path
    architecture: LlamaConfig
    tokenizer: Tokenizer | None
    packed: PackedEnclave | None
    codes: dict[str, Codes] = field(default_factory=dict, repr=False, compare=False)


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
    require_digest(model, config.model_digest, on_step)
    wrap_worker = wrap("worker") if wrap else None
    if level == "monolithic":
        from tsqp.bench.monolithic import Monolithic  # noqa: PLC0415  transformers is needed by this level only

        yield Runnable(Monolithic(model.directory, codec.TORCH_DTYPES[config.dtype]), Meter())
    elif level == "local":
        yield _local(model, config, on_step)
    else:
        worker = worker_peer(config, level, wrap_worker)
        if level == "open":
            with _open(model, config, worker, on_step, offload_attention=offload_attention) as loaded:
                yield loaded
        else:
            if model.packed is None:
                raise InputError("the integer levels need a packed model.")
            dealers = _dealers(config, level, wrap)
            with checked(model.packed, config, worker, dealers, on_step, on_notice, kept=model.codes) as loaded:
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


def check_peers(level: str, config: EnclaveConfig) -> None:
    """Refuse addresses, keys and dealers that cannot work, before anything is loaded or anybody is met.

    Raises:
        TsqpError: as ``runnable`` does for them.
    """
    worker = worker_peer(config, level, None)
    dealers = _dealers(config, level, None)
    if dealers:
        check_dealers(worker, dealers, lambda _sentence: None)


def check_worker(model: Model, config: EnclaveConfig, on_step: OnStep = lambda _name, _done: None) -> None:
    """Meet the worker, see whether it serves this model at ``config.level``, and part.

    Raises:
        TsqpError: it does not, or as connecting does.
    """
    meet(worker_peer(config, config.level, None), config, expected_of(model, config, on_step))[0].close()


def expected_of(model: Model, config: EnclaveConfig, on_step: OnStep = lambda _name, _done: None) -> Expected:
    """Return what a worker must say that serves this model at ``config.level``.

    Raises:
        WeightsError: a weight is missing.
    """
    if model.packed is not None:
        return expected_worker(model.packed)
    return expected_open(config, model.architecture, _digest(model, on_step))


def worker_peer(config: EnclaveConfig, level: str, wrap: Wrap | None) -> Peer:
    """Return where the worker of some settings is, and its key.

    Raises:
        InputError: they name none.
        ConfigError: its key cannot be read.
    """
    if config.worker is None:
        raise InputError(f"the level {level!r} needs a worker's address.")
    key = load_public(config.worker_key) if config.worker_key is not None else None
    peer = Peer(address=config.worker, key=key, own=_own_key(config), wrap=wrap)
    check_peer_link(peer, config)
    return peer


def _own_key(config: EnclaveConfig) -> KeyPair | None:
    """Read this process's pair, if it has one; who would have it to no use may think that it protects something."""
    if config.own_key is None:
        return None
    if config.worker and parse(config.worker).scheme != "shm" and not (config.worker_key or config.dealer_keys):
        raise ConfigError(
            "an own key is of use on encrypted links only: give the worker's key too (--worker-key), or leave it out."
        )
    return load_secret(config.own_key)


def _dealers(config: EnclaveConfig, level: str, wrap: Callable[[str], Wrap] | None) -> tuple[Peer, ...] | None:
    """Return the dealers of a `masked` run, none for the enclave's own masks; None where nothing is masked."""
    if level != "masked":
        return None
    if config.masks == "enclave" and config.dealers:
        raise ConfigError("masks by the enclave and dealers exclude each other: leave out --masks enclave or --dealer.")
    if config.masks == "dealers" and not config.dealers:
        raise ConfigError("--masks dealers needs at least one --dealer.")
    peers = dealer_peers(config, load_public, _own_key(config))
    if wrap is None:
        return peers
    return tuple(replace(peer, wrap=wrap(f"dealer {number}")) for number, peer in enumerate(peers, 1))


def _local(model: Model, config: EnclaveConfig, on_step: OnStep) -> Runnable:
    """Compute everything here: in floats, or over a packed model in exact integers."""
    meter = Meter()
    if model.packed is not None:
        source = DirectoryCodes(Path(config.codes) if config.codes else model.directory)
        checks = read_codes(
            model.packed.manifest, source, model.codes, on_progress=lambda done: on_step("reading the codes", done)
        )
        products = LocalProducts(checks.codes, torch.get_num_threads())
        llama = Llama(model.architecture, ExactOps(model.packed, products, meter))
        loaded = taking_turns(llama, meter, cutting(config, shared_cores=True))
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


def digest_of(model: Model, on_step: OnStep = lambda _name, _done: None) -> str:
    """Return what names a model: of a packed one its manifest's digest, else that of its weights, which are read.

    Raises:
        WeightsError: a weight is missing.
    """
    return model.packed.manifest.digest if model.packed is not None else _digest(model, on_step)


def require_digest(model: Model, expected: str | None, on_step: OnStep = lambda _name, _done: None) -> None:
    """Refuse another model than the one that was asked for by its digest, if one was.

    Raises:
        ModelMismatchError: it is another.
    """
    if expected is None:
        return
    found = digest_of(model, on_step)
    if found != expected.lower():
        raise ModelMismatchError(
            f"the model in {model.directory} has the digest {found}, not {printable(expected)} "
            "(TSQP_MODEL_DIGEST): it is another model, or it was changed."
        )


def _digest(model: Model, on_step: OnStep) -> str:
    checkpoint = Checkpoint(model.directory)
    checkpoint.require(weight_shapes(model.architecture))
    return model_digest(model.architecture, checkpoint, lambda done: on_step("hashing the weights", done))


@contextmanager
def _open(
    model: Model, config: EnclaveConfig, worker: Peer, on_step: OnStep, *, offload_attention: bool
) -> Iterator[Runnable]:
    digest, meter = _digest(model, on_step), Meter()
    with ExitStack() as links:
        link = links.enter_context(connect(worker, config, model.architecture, digest, meter))
        llama = Llama(model.architecture, link.ops, offload_attention=offload_attention)

        def reopen() -> bool:
            nonlocal link
            links.close()
            link = links.enter_context(connect(worker, config, model.architecture, digest, meter, again=True))
            llama.use(link.ops)
            return True

        def look() -> None:
            link.session.hello(config.connect_timeout_s)

        shared = shares_cores(worker, link.welcome)
        loaded = taking_turns(llama, meter, cutting(config, shared_cores=shared))
        groups = step_groups(config, shared_cores=shared)
        yield replace(loaded, stepper=Stepper(llama, groups=groups, reopen=reopen, look=look))
