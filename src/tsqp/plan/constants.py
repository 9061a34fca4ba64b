"""The constants of the plan's model: seconds of one core for each unit of work, with the machine they were taken on."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from tsqp.errors import ConfigError
from tsqp.measurements import Hardware

Seconds = Annotated[float, Meta(ge=0, le=10)]

# What the parts are made of: see ``work.together``.
ENCLAVE_UNITS = ("step", "call", "word", "score", "cached", "logit")
WORKER_UNITS = ("call", "weight_byte", "mac", "word")


class WorkerConstants(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A worker's on a CPU, by unit.

    ``overlaps``: whether a product takes the longer of reading weights and multiplying, instead of their sum.
    """

    seconds: dict[str, Seconds]
    overlaps: bool

    def bound(self, counted: Mapping[str, float]) -> dict[str, float]:
        """Return a product's work without what does not bound it."""
        if not self.overlaps:
            return dict(counted)
        reading, multiplying = (self.seconds[unit] * counted[unit] for unit in ("weight_byte", "mac"))
        return {**counted, ("weight_byte" if reading < multiplying else "mac"): 0.0}

    def time_s(self, counted: Mapping[str, float]) -> float:
        """Return what a product takes of one core."""
        return sum(self.seconds[unit] * count for unit, count in self.bound(counted).items())


class LevelConstants(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of one core for each unit: of the enclave, and of a worker on a CPU."""

    enclave: dict[str, Seconds]
    worker: WorkerConstants


class LinkConstants(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An encrypted tcp link of this machine with itself.

    ``trip_s``: a short round trip. ``trip_core_s``: what the enclave's own thread does of it. ``byte_s``: what each
    byte adds to its time. ``byte_core_s``: what the enclave's link thread does for each, mostly encryption.
    """

    trip_s: Seconds
    trip_core_s: Seconds
    byte_s: Seconds
    byte_core_s: Seconds


class Constants(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of them. ``mask_word_s`` is what a word of keystream takes, ``engine_step_s`` planning and telling a step."""

    date: str
    commit: str
    command: str
    hardware: Hardware
    levels: dict[str, LevelConstants]
    link: LinkConstants
    mask_word_s: Seconds
    engine_step_s: Seconds

    def of(self, level: str) -> LevelConstants:
        """Return a level's.

        Raises:
            ConfigError: there are none.
        """
        found = self.levels.get(level)
        if found is None:
            raise ConfigError(
                f"the constants of {self.date} have none for the level {level}, only for {', '.join(self.levels)}: "
                "take them again with --measure."
            )
        return found


def load_constants(path: Path | None) -> Constants:
    """Read constants.

    Args:
        path: a file that ``tsqp plan --measure`` has written; None for those that come with TSQP.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    if path is None:
        content = resources.files("tsqp.plan").joinpath("data", "constants.json").read_bytes()
        return msgspec.json.decode(content, type=Constants)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--constants {path}: cannot read it ({error.strerror}). tsqp plan --measure --constants FILE writes it."
        ) from error
    try:
        found = msgspec.json.decode(content, type=Constants)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"--constants {path}: {error}; expected what tsqp plan --measure writes.") from error
    for level in found.levels.values():
        if set(level.enclave) != set(ENCLAVE_UNITS) or set(level.worker.seconds) != set(WORKER_UNITS):
            raise ConfigError(f"--constants {path}: it is of another version of TSQP; take them again with --measure.")
    return found


def write_constants(constants: Constants, path: Path) -> None:
    """Write a file that ``load_constants`` reads.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(constants), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"--constants {path}: cannot write it ({error.strerror}).") from error
