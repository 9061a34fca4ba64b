"""Where mask products u = r W come from: the enclave's own cores, or dealers that do not collude with the worker.

With k dealers r = r_1 + ... + r_k, each part from a key of its own: the worker and all k together could unmask, fewer
learn nothing. Products are not checked here; the check of the final result covers them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

# How many requests of one enclave are at a dealer: half of what it takes of a client by default.
_UNDER_WAY = 32


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


@dataclass(slots=True, eq=False)
class _Part:
    """Mask rows whose products are one request; ``request_id`` is None until it is sent."""

    group: str
    first: int
    count: int
    request_id: int | None = None
    is_taken: bool = False


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
        self._unsent: deque[_Part] = deque()
        self._under_way = 0
        self.peers: tuple[str, ...] = (f"dealer {session.peer}",)

    def rows(self, group: str, first: int, count: int) -> Tensor:
        """See ``MaskSource.rows``."""
        number, shape = self._groups[group]
        return self._key.rows(number, first, count, shape.in_features)

    def start(self, group: str, first: int, count: int) -> Callable[[], Tensor]:
        """See ``MaskSource.start``. The requests leave at once, as far as there is room for them at the dealer."""
        most = messages.most_mask_rows(self._groups[group][1].in_features, self._groups[group][1].rows)
        parts = [_Part(group, first + at, min(most, count - at)) for at in range(0, count, most)]
        self._unsent.extend(parts)

        def collect() -> Tensor:
            with self._forgotten_if_it_fails(parts):
                return _joined([self._collect(part) for part in parts])

        with self._forgotten_if_it_fails(parts):
            self._send_some()
        return collect

    def _send_some(self) -> None:
        while self._unsent and self._under_way < _UNDER_WAY:
            self._send(self._unsent[0])

    def _send(self, part: _Part) -> int:
        seed = self._key.seed()
        part.request_id = self._session.submit(
            lambda i: messages.MaskProduct(id=i, group=part.group, seed=seed, first=part.first, count=part.count),
            operation=f"mask product {part.group}",
        )
        self._unsent.remove(part)
        self._under_way += 1
        return part.request_id

    def _collect(self, part: _Part) -> Tensor:
        # One that is not sent is behind others that fill the room and are not wanted yet.
        request_id = self._send(part) if part.request_id is None else part.request_id
        reply, frames = self._session.result(request_id, messages.Result)
        part.is_taken = True
        self._under_way -= 1
        self._send_some()
        expect = TensorSpec("int32", (part.count, self._groups[part.group][1].rows))
        claim = codec.claim(reply, frames, expect, f"mask product {part.group} from {self._session.peer}")
        return claim.unverified()

    @contextmanager
    def _forgotten_if_it_fails(self, parts: Sequence[_Part]) -> Iterator[None]:
        """Give parts up that nobody will want once one of them has failed; their rows stay burnt."""
        try:
            yield
        except BaseException:
            for part in parts:
                if part.request_id is None:
                    self._unsent.remove(part)
                elif not part.is_taken:
                    self._session.abandon([part.request_id])
                    self._under_way -= 1
            raise


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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
