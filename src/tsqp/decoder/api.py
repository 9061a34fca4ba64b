"""``tsqp.attach``, ``tsqp.detach``, ``tsqp.export``: a Hugging Face decoder whose linear layers a worker multiplies."""

from __future__ import annotations

import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from tsqp.checked import checked_worker
from tsqp.config import WORKER_LEVELS, EnclaveConfig, load
from tsqp.decoder.layers import GroupProducts, Products
from tsqp.decoder.moving import Moved, move
from tsqp.decoder.survey import Survey, survey
from tsqp.enclave.codes import DirectoryCodes, read_codes
from tsqp.enclave.connect import meet
from tsqp.enclave.remote_ops import OpenLinears
from tsqp.enclave.session import Expected
from tsqp.errors import ConfigError, InputError, ModelMismatchError, UnsupportedModelError, WeightsError, printable
from tsqp.launch import local_worker
from tsqp.levels import check_options, masking_dealers, worker_peer
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup
from tsqp.model.exact import ExactLinears, LocalProducts
from tsqp.model.linear_map import (
    FLOAT_DTYPES,
    FLOATS,
    FloatWeights,
    LinearMap,
    MapManifest,
    floats_digest,
    open_floats,
    open_map,
    write_floats,
    write_map,
)
from tsqp.model.manifest import WORKER
from tsqp.paths import cache_directory
from tsqp.wire import codec

_HANDLE = "_tsqp_attached"
_NAMES = frozenset(entry.name for entry in fields(EnclaveConfig))
Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Attached:
    """A model whose linear layers a worker multiplies; ``with`` detaches it at the end.

    Attributes:
        level: at which.
        directory: of the linear map. It must stay until the model is detached.
        groups: what the worker multiplies, in the order of the forward pass.
        moved: paths of the modules whose weights are no longer here.
        stayed: paths of modules with matrices that stayed, and why.
        freed_bytes: size of the weights that are no longer here.
        meter: what it has cost so far.
    """

    level: str
    directory: Path
    groups: tuple[LinearGroup, ...]
    moved: tuple[str, ...]
    stayed: dict[str, str]
    freed_bytes: int
    meter: Meter
    _model: Any
    _back: Moved
    _products: Products
    _end: Callable[[], object]

    def detach(self) -> None:
        """Give the model its weights back, bit for bit, and part from the worker. Again it does nothing.

        Raises:
            WeightsError: the linear map is gone or was changed. The model stays as it is; what is missing can be put
                back in ``directory`` and this called again.
        """
        if vars(self._model).get(_HANDLE) is not self:
            return
        self._back.restore()
        del vars(self._model)[_HANDLE]
        self._products.end()
        self._end()

    close = detach

    def __enter__(self) -> Attached:  # noqa: PYI034  typing.Self needs Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        stayed = "".join(f"\n  {path}: {why}" for path, why in self.stayed.items())
        return (
            f"attached at {self.level}: {len(self.moved)} modules moved in {len(self.groups)} groups, "
            f"{self.freed_bytes / 1e6:.1f} MB freed; stayed:{stayed or ' nothing'}"
        )


def attach(
    model: Any,  # noqa: ANN401  transformers has no types
    worker: str | None = None,
    level: str | None = None,
    *,
    directory: str | Path | None = None,
    accept_expert_leak: bool = False,
    on_notice: Notice = warnings.warn,
    **settings: Any,  # noqa: ANN401
) -> Attached:
    """Move a model's linear layers to a worker. ``model.generate()``, caches and samplers work as before.

    Args:
        model: a Hugging Face causal language model, in floats, on the CPU, in evaluation mode. It is changed in place.
        worker: address of a worker that serves the linear map of this model (``export``); None starts one here.
        level: `open`, `verified`, `masked`, or `local` for the int8 products of the two in this process; None means
            what ``TSQP_LEVEL`` says, else `open`.
        directory: of the model's linear map, which is written there if it does not exist; None means a temporary one.
        accept_expert_leak: allow a mixture of experts at `masked`, where the worker still sees which experts are used
            and by how many tokens.
        on_notice: told in a sentence what the user should know; by default a warning.
        settings: of ``EnclaveConfig`` by name, such as ``worker_key``, ``dealers`` or ``mask_pool``.

    Returns:
        What moved and what stayed, and the way back.

    Raises:
        InputError: the model is attached already, or no such model (``survey``).
        UnsupportedModelError: it is quantised, has shared layers, or nothing that can be moved.
        ConfigError: a setting cannot be, or a mixture of experts at `masked` was not accepted.
        WeightsError: ``directory`` is of another model.
        TsqpError: as starting a worker or connecting does. The model is unchanged then.
    """
    config = _config(worker, level, settings)
    _refuse_attached(model)
    found = survey(model)
    config = replace(config, dtype=_dtype(model))
    if found.experts and config.level == "masked" and not accept_expert_leak:
        raise ConfigError(
            "the model is a mixture of experts: at masked the worker still sees which experts are used, and by how "
            "many tokens of each request, which tells something of the prompt. Accept that with "
            "accept_expert_leak=True, or run another model."
        )
    meter = Meter()
    with ExitStack() as opening:
        where = Path(directory) if directory is not None else opening.enter_context(_temporary())
        digest, weights = _exported(model, found, where, with_codes=directory is not None or config.level != "open")
        site = _Site(found, digest, where, config, meter)
        products = opening.enter_context(_products(site, on_notice))
        back = move(found, site.groups, products, weights)
        end = weakref.finalize(model, opening.pop_all().close)
    attached = Attached(
        level=config.level,
        directory=where,
        groups=site.groups,
        moved=found.moved,
        stayed=found.stayed,
        freed_bytes=back.freed_bytes,
        meter=meter,
        _model=model,
        _back=back,
        _products=products,
        _end=end,
    )
    vars(model)[_HANDLE] = attached
    return attached


def detach(model: Any) -> None:  # noqa: ANN401
    """Undo ``attach``: see ``Attached.detach``.

    Raises:
        InputError: the model is not attached.
        WeightsError: its linear map is gone or was changed.
    """
    attached = getattr(model, _HANDLE, None)
    if attached is None:
        raise InputError("the model is not attached: there is nothing to detach.")
    attached.detach()


def export(
    model: Any,  # noqa: ANN401
    directory: str | Path,
    name: str | None = None,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> MapManifest:
    """Write a model's linear map: what a worker elsewhere needs, and what ``attach`` may be given.

    Args:
        model: as ``attach`` takes it; it is not changed.
        directory: to be created. Give its ``floats/`` to a worker at `open`, its ``worker/`` to one at the other levels
            and to dealers.
        name: what to call the model; by default its own name.
        on_progress: called with the fraction done.

    Returns:
        The manifest; its ``digest`` is what ``TSQP_MODEL_DIGEST`` may say.

    Raises:
        SetupError: ``directory`` exists or cannot be written.
        InputError, UnsupportedModelError: as ``attach``.
    """
    _refuse_attached(model)
    return write_map(survey(model).weights(), name or _name(model), Path(directory), on_progress)


def _refuse_attached(model: object) -> None:
    if getattr(model, _HANDLE, None) is not None:
        raise InputError("the model is attached already: call tsqp.detach(model) first.")


def _config(worker: str | None, level: str | None, settings: dict[str, Any]) -> EnclaveConfig:
    """Build the settings, and refuse those that would be ignored."""
    if unknown := settings.keys() - _NAMES:
        raise ConfigError(f"attach has no setting {min(unknown)!r}; known: {', '.join(sorted(_NAMES))}.")
    config = load(EnclaveConfig, {**settings, "worker": worker, "level": level})
    if config.level not in (*WORKER_LEVELS, "local"):
        raise ConfigError(f"a model cannot be attached at {config.level}: choose open, verified, masked or local.")
    if config.worker_key and config.worker is None:
        raise ConfigError("a worker's key is of no use without its address: give worker= too, or leave worker_key out.")
    check_options(config.level, config, offload_attention=False)
    return config


def _name(model: Any) -> str:  # noqa: ANN401
    return Path(str(getattr(model.config, "name_or_path", "") or type(model).__name__)).name


def _dtype(model: Any) -> str:  # noqa: ANN401
    """Return the dtype a worker at `open` must compute in."""
    if model.dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(f"the model is in {model.dtype}: expected float32, float16 or bfloat16.")
    return codec.dtype_name(model.dtype)


@contextmanager
def _temporary() -> Iterator[Path]:
    """Make room for a linear map on disk, for as long as a model is attached."""
    with tempfile.TemporaryDirectory(prefix="attached-", dir=cache_directory(), ignore_cleanup_errors=True) as name:
        yield Path(name) / "map"


def _exported(
    model: Any,  # noqa: ANN401
    found: Survey,
    directory: Path,
    *,
    with_codes: bool,
) -> tuple[str, FloatWeights]:
    """Write the linear map if it is not there; return the digest of the model's weights, and their copy, to read."""
    if directory.exists():
        digest = floats_digest(found.weights())
    elif not with_codes:
        digest = write_floats(found.weights(), directory)
    else:
        digest = write_map(found.weights(), _name(model), directory).source_digest
    weights = open_floats(directory)
    if weights.digest != digest:
        raise _other_map(directory, weights.digest, digest)
    return digest, weights


def _other_map(directory: Path, stored: str, digest: str) -> WeightsError:
    return WeightsError(
        f"{directory} is the linear map of another model: its weights have the digest {stored[:12]}, this model's "
        f"{digest[:12]}. Name another directory, or remove that one."
    )


@dataclass(frozen=True, slots=True)
class _Site:
    """What a level needs to know of one model."""

    found: Survey
    digest: str
    directory: Path
    config: EnclaveConfig
    meter: Meter

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return tuple(each.group for each in self.found.weights())


@contextmanager
def _products(site: _Site, on_notice: Notice) -> Iterator[Products]:
    """Connect to whoever multiplies at a level, for the time of a ``with`` block."""
    with ExitStack() as stack:
        config = site.config
        if config.level in WORKER_LEVELS and config.worker is None:
            part = FLOATS if config.level == "open" else WORKER
            words = ["--model", str(site.directory / part), "--dtype", config.dtype]
            config = replace(config, worker=stack.enter_context(local_worker(words)))
        if config.level == "open":
            yield Products(stack.enter_context(_open(site, config)), nullcontext)
            return
        linear_map = open_map(site.directory, site.groups)
        if linear_map.manifest.source_digest != site.digest:
            raise _other_map(site.directory, linear_map.manifest.source_digest, site.digest)
        _require_digest(linear_map, config, site.directory)
        if config.level == "local":
            checks = read_codes(linear_map.manifest, DirectoryCodes(site.directory), {})
            local = LocalProducts(checks.codes, torch.get_num_threads())
            yield Products(ExactLinears(linear_map, local, site.meter), nullcontext)
            return
        peer = worker_peer(config, config.level, None)
        dealers = masking_dealers(config, config.level, None)
        config = replace(config, codes=str(site.directory))
        checked = stack.enter_context(
            checked_worker(
                linear_map,
                config,
                peer,
                dealers,
                meter=site.meter,
                on_step=lambda *_: None,
                on_notice=on_notice,
                kept={},
            )
        )
        yield Products(ExactLinears(linear_map, checked.products, site.meter), checked.paused)


@contextmanager
def _open(site: _Site, config: EnclaveConfig) -> Iterator[GroupProducts]:
    expected = Expected(
        serves="open",
        digest=site.digest,
        dtype=config.dtype,
        groups=site.groups,
        wire_dtype=config.wire_dtype or config.dtype,
    )
    session, _ = meet(worker_peer(config, "open", None), config, expected, site.meter)
    try:
        yield OpenLinears(session, site.groups, codec.TORCH_DTYPES[config.wire_dtype or config.dtype])
    finally:
        session.close()


def _require_digest(linear_map: LinearMap, config: EnclaveConfig, directory: Path) -> None:
    if config.model_digest is not None and linear_map.manifest.digest != config.model_digest.lower():
        raise ModelMismatchError(
            f"the linear map in {directory} has the digest {linear_map.manifest.digest}, not "
            f"{printable(config.model_digest)} (TSQP_MODEL_DIGEST): it is another model, or it was changed."
        )
