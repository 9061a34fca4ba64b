"""What ``tsqp plan`` is asked, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tsqp.config import DTYPES, WORKER_LEVELS
from tsqp.errors import ConfigError
from tsqp.model.architecture import LlamaConfig

MASKS = ("dealers", "enclave")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to plan for.

    Attributes:
        users: who generate at the same time.
        tokens_s: tokens a second that each of them is to get.
        context: tokens of a prompt and its answer together.
        prompt: of them, the prompt's.
        level: `open`, `verified` or `masked`.
        masks: who makes them, ``dealers`` or ``enclave``; None at the other levels.
        dealers: how many parties make masks.
        dtype: of weights and activations at `open`.
        gpu: the worker's.
        enclave_cores, memory_gb: of an enclave's host.
        link_gbps: of each machine's link.
        latency_ms: of the network, there and back.

    Raises:
        ConfigError: a number out of range, or settings that do not go together.
    """

    users: int
    tokens_s: float
    context: int
    prompt: int
    level: str
    masks: str | None
    dealers: int
    dtype: str
    gpu: str
    enclave_cores: int
    memory_gb: float
    link_gbps: float
    latency_ms: float

    def __post_init__(self) -> None:
        for option, value, least, most in (
            ("--users", self.users, 1, 1e9),
            ("--tokens-per-s", self.tokens_s, 1e-3, 1e4),
            ("--context", self.context, 2, 1 << 24),
            ("--enclave-cores", self.enclave_cores, 1, 4096),
            ("--enclave-memory", self.memory_gb, 1, 1e5),
            ("--link", self.link_gbps, 1e-3, 1e5),
            ("--latency", self.latency_ms, 0, 1e4),
        ):
            if not (math.isfinite(value) and least <= value <= most):
                raise ConfigError(f"{option} {value:g}: expected a number from {least:g} to {most:g}.")
        if not 1 <= self.prompt < self.context:
            raise ConfigError(
                f"--prompt {self.prompt}: expected at least 1, and less than the {self.context} tokens of --context, "
                "so that an answer has room."
            )
        if self.level not in WORKER_LEVELS:
            raise ConfigError(
                f"--level {self.level}: a plan is for a level with a worker, one of {', '.join(WORKER_LEVELS)}."
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES)}.")
        self._check_masks()

    def _check_masks(self) -> None:
        if self.level != "masked":
            if self.masks:
                raise ConfigError(f"--masks is for the level masked, this plan is for {self.level}: leave it out.")
            return
        if self.masks not in MASKS:
            raise ConfigError(
                f"the level masked needs a source of masks, got {self.masks!r}: --masks dealers (with --dealers, how "
                "many parties) or --masks enclave."
            )
        if self.masks == "dealers" and not 1 <= self.dealers <= 16:  # noqa: PLR2004
            raise ConfigError(
                f"--dealers {self.dealers}: masks by dealers need a number of parties from 1 to 16, or use --masks "
                "enclave."
            )

    def check_context(self, architecture: LlamaConfig) -> None:
        """Refuse a context that the model does not have.

        Raises:
            ConfigError: it is longer.
        """
        if self.context > architecture.context_length:
            raise ConfigError(
                f"--context {self.context}: the model takes {architecture.context_length} tokens at most, prompt and "
                "answer together."
            )
