"""GPUs and prices to plan with: a TOML file that comes with TSQP, or the user's own."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tsqp.errors import ConfigError, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Positive = Annotated[float, Meta(gt=0, le=1e9)]
Share = Annotated[float, Meta(gt=0, le=1)]
Price = Annotated[float, Meta(ge=0, le=1e9)]

_PACKAGED = "src/tsqp/plan/data/machines.toml"


class Gpu(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU by its datasheet: memory in GB, bandwidths in GB/s, dense int8 TOPS, dense TFLOPS, price of an hour."""

    memory_gb: Positive
    memory_gb_per_s: Positive
    int8_tops: Positive
    half_tflops: Positive
    single_tflops: Positive
    pcie_gb_per_s: Positive
    price_hour: Price


class Assumed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which part of a datasheet's numbers is reached, microseconds of each request, and how busy a machine is to be."""

    products: Share
    memory: Share
    pcie: Share
    request_us: Annotated[float, Meta(ge=0, le=1e6)]
    busy: Share


class Prices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prices of an hour, and when they held."""

    currency: Annotated[str, Meta(min_length=1, max_length=8)]
    date: Annotated[str, Meta(min_length=1, max_length=32)]
    enclave_core_hour: Price
    enclave_gb_hour: Price
    link_hour: Price


class Machines(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file."""

    assumed: Assumed
    prices: Prices
    gpus: dict[str, Gpu]

    def gpu(self, name: str) -> Gpu:
        """Return a GPU.

        Raises:
            ConfigError: none has this name.
        """
        found = self.gpus.get(name.lower())
        if found is None:
            raise ConfigError(
                f"--gpu {printable(name)} is not known: {', '.join(self.gpus)} are. To add it, copy {_PACKAGED}, add a "
                "table [gpus.NAME] with the numbers of its datasheet, and give the copy with --machines."
            )
        return found


def load_machines(path: Path | None) -> Machines:
    """Read GPUs and prices.

    Args:
        path: the user's file; None for the one that comes with TSQP.

    Raises:
        ConfigError: it cannot be read, or something in it is missing, unknown or out of range.
    """
    if path is None:
        return _parsed(resources.files("tsqp.plan").joinpath("data", "machines.toml").read_text("utf-8"), _PACKAGED)
    try:
        return _parsed(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"--machines {path}: cannot read it ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--machines {path}: not valid TOML (it is not UTF-8).") from error


def _parsed(text: str, origin: str) -> Machines:
    try:
        return msgspec.convert(tomllib.loads(text), Machines)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--machines {origin}: not valid TOML ({error}).") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"--machines {origin}: {error}. Compare it with {_PACKAGED}.") from error
