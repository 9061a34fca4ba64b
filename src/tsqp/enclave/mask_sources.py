"""Where mask products u = r W come from: the enclave's own cores, or dealers that do not collude with the worker.

With k dealers r = r_1 + ... + r_k, each part from a key of its own: the worker and all k together could unmask, fewer
learn nothing. Products are not checked here; the check of the final result covers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tsqp.arith.ring import Codes, multiply
from tsqp.enclave.masks import MaskKey
from tsqp.enclave.session import Session
from tsqp.model.architecture import LinearGroup
from tsqp.threads import using_threads
from tsqp.wire import codec, messages
from tsqp.wire.messages import TensorSpec


class MaskSource(Protocol):
    """Mask rows by number, and their products. ``peers`` names who else contributes to the products."""

    peers: tuple[str, ...]

    def rows(self, group: str, first: int, count: int) -> Tensor:
        """Return mask rows: int32, shape (count, K)."""

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        """Ask for the products of mask rows; call the result for them: int32, shape (count, N)."""


class EnclaveMasks:
    """Products computed in this process: no other party, but the enclave pays for them.

    Args:
        groups: the model's linear groups, in order.
        codes: by group.
        threads: CPU threads to compute with.
    """

    peers: tuple[str, ...] = ()

    def __init__(self, groups: Sequence[LinearGroup], codes: dict[str, Codes], threads: int) -> None:
        self._threads = threads
        self._numbers = {group.name: number for number, group in enumerate(groups)}
        self._codes = codes
        self._key = MaskKey()

    def rows(self, group: str, first: int, count: int) -> Tensor:
        """See ``MaskSource.rows``."""
        return self._key.rows(self._numbers[group], first, count, self._codes[group].inputs)

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        """See ``MaskSource.start``. Nothing is computed before the call."""

        def compute() -> Tensor:
            with using_threads(self._threads):
                return multiply(self.rows(group, first, count), self._codes[group])

        return compute


class DealerMasks:
    """Products by one dealer, from a key that it is sent. Its link must be encrypted and authenticated.

    Args:
        groups: the model's linear groups, in order.
        session: the link to the dealer, which has been checked to hold the model.
    """

    def __init__(self, groups: Sequence[LinearGroup], session: Session) -> None:
        self._groups = {group.name: (number, group) for number, group in enumerate(groups)}
        self._session = session
        self._key = MaskKey()
        self.peers: tuple[str, ...] = (f"dealer {session.peer}",)

    def rows(self, group: str, first: int, count: int) -> Tensor:
        """See ``MaskSource.rows``."""
        number, shape = self._groups[group]
        return self._key.rows(number, first, count, shape.in_features)

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        """See ``MaskSource.start``. The request leaves at once."""
        seed = self._key.seed()
        request_id = self._session.submit(
            lambda i: messages.MaskProduct(id=i, group=group, seed=seed, first=first, count=count),
            operation=f"mask product {group}",
        )
        expect = TensorSpec("int32", (count, self._groups[group][1].rows))

        def collect() -> Tensor:
            reply, frames = self._session.result(request_id, messages.Result)
            claim = codec.claim(reply, frames, expect, f"mask product {group} from {self._session.peer}")
            return claim.unverified()

        return collect


class SummedMasks:
    """Masks that are sums of several dealers' masks.

    Args:
        sources: at least one.
    """

    def __init__(self, sources: Sequence[MaskSource]) -> None:
        self._sources = sources
        self.peers: tuple[str, ...] = tuple(peer for source in sources for peer in source.peers)

    def rows(self, group: str, first: int, count: int) -> Tensor:
        """See ``MaskSource.rows``."""
        return _sum([source.rows(group, first, count) for source in self._sources])

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        """See ``MaskSource.start``. All dealers compute at the same time."""
        pending = [source.start(group, first, count) for source in self._sources]
        return lambda: _sum([collect() for collect in pending])


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = torch.add(total, part)
    return total
