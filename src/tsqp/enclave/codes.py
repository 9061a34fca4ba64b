"""Reads a model's int8 codes once, from whoever has them, and makes the checks of its products.

Codes come from a directory or from a worker, untrusted either way: the same copied bytes are hashed and used, and what
was made of them is accepted only if the digest at the end is the manifest's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tsqp.arith.ring import Codes, lay_out
from tsqp.enclave.freivalds import Checker
from tsqp.enclave.session import Session
from tsqp.errors import IntegrityError
from tsqp.model.manifest import Manifest, PackedGroup
from tsqp.model.packed import open_codes
from tsqp.wire import codec, messages
from tsqp.wire.messages import TensorSpec

# One message's worth: a few megabytes of codes.
_CHUNK_BYTES = 4 << 20


class CodesSource(Protocol):
    """Who has a model's codes."""

    name: str

    def rows(self, group: PackedGroup) -> Iterator[Tensor]:
        """Yield a group's codes from the first row to the last: int8, shape (R, K), a copy that nobody else changes."""


class DirectoryCodes:
    """Codes from a packed model's ``worker/`` on this machine's disk.

    Raises:
        WeightsError: there are none.
    """

    def __init__(self, directory: Path) -> None:
        self.name = str(directory)
        self._codes = open_codes(directory)

    def rows(self, group: PackedGroup) -> Iterator[Tensor]:
        """See ``CodesSource.rows``."""
        yield self._codes.read(group.name)


class StreamedCodes:
    """Codes as a worker sends them."""

    def __init__(self, session: Session) -> None:
        self.name = f"worker {session.peer}"
        self._session = session

    def rows(self, group: PackedGroup) -> Iterator[Tensor]:
        """See ``CodesSource.rows``. The next request is under way while one reply is used."""
        step = max(1, _CHUNK_BYTES // group.in_features)
        counts = [min(step, group.rows - first) for first in range(0, group.rows, step)]
        ids = [self._ask(group, 0, counts[0])]
        for index, count in enumerate(counts):
            if index + 1 < len(counts):
                ids.append(self._ask(group, (index + 1) * step, counts[index + 1]))
            reply, frames = self._session.result(ids[index], messages.Result)
            expect = TensorSpec("int8", (count, group.in_features))
            # Hashed and used by the caller, never compared with anything before its digest is.
            yield codec.claim(reply, frames, expect, f"codes of {group.name} from {self.name}").unverified()

    def _ask(self, group: PackedGroup, first: int, rows: int) -> int:
        return self._session.submit(
            lambda i: messages.Codes(id=i, group=group.name, first=first, rows=rows), operation=f"codes of {group.name}"
        )


@dataclass(frozen=True, slots=True)
class Checks:
    """What the enclave made of a model's codes.

    Attributes:
        checkers: by group.
        codes: by group, laid out for products in this process, where they were to be kept; else empty.
    """

    checkers: dict[str, Checker]
    codes: dict[str, Codes]


@torch.inference_mode()
def read_codes(
    manifest: Manifest,
    source: CodesSource,
    kept: dict[str, Codes] | None = None,
    on_progress: Callable[[float], None] = lambda _done: None,
) -> Checks:
    """Read all codes once.

    Args:
        manifest: what they must be.
        source: who has them.
        kept: keep them, for products in this process: those that this has not are added once they are known to be the
            manifest's, and those that it has stay, as they are the same; None keeps nothing.
        on_progress: told the fraction done.

    Raises:
        IntegrityError: they are others than the manifest's.
        TransportError, ProtocolError, WeightsError: the source fails.
    """
    checks = Checks({}, {} if kept is None else kept)
    for done, group in enumerate(manifest.groups):
        checker = Checker(group.name, group.rows, group.in_features)
        codes_NK = torch.empty(group.rows, group.in_features, dtype=torch.int8) if _lacks(kept, group) else None
        digest, first = hashlib.sha256(), 0
        for codes_RK in source.rows(group):
            if codes_RK.dtype != torch.int8 or codes_RK.shape[1:] != (group.in_features,):
                raise _other_codes(group, source, f"shape {list(codes_RK.shape)}")
            if first + len(codes_RK) > group.rows:
                raise _other_codes(group, source, f"at least {first + len(codes_RK)} rows")
            digest.update(codec.frame_of(codes_RK))
            checker.absorb(codes_RK)
            if codes_NK is not None:
                codes_NK[first : first + len(codes_RK)] = codes_RK
            first += len(codes_RK)
        if digest.hexdigest() != group.sha256:
            raise _other_codes(group, source, f"sha256 {digest.hexdigest()}")
        checks.checkers[group.name] = checker
        if codes_NK is not None:
            checks.codes[group.name] = lay_out(codes_NK)
        on_progress((done + 1) / len(manifest.groups))
    return checks


def _lacks(kept: dict[str, Codes] | None, group: PackedGroup) -> bool:
    return kept is not None and group.name not in kept


def _other_codes(group: PackedGroup, source: CodesSource, found: str) -> IntegrityError:
    return IntegrityError(
        f"the codes of {group.name} from {source.name} are not the model's: expected {group.rows} rows of "
        f"{group.in_features} with sha256 {group.sha256}, got {found}."
    )
