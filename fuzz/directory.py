"""The directory of a pool, which whoever publishes it writes."""

from __future__ import annotations

import random

from tsqp.errors import ProtocolError
from tsqp.wire import directory
from tsqp.wire.directory import Directory, Entry

_KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


def run(data: bytes) -> None:
    """Read a directory; one that is read names tcp addresses only, and is written as it was read."""
    try:
        found = directory.decode(data)
    except ProtocolError:
        return
    if not all(entry.address.startswith("tcp://") for entry in (*found.workers, *found.dealers)):
        raise AssertionError("an address is not one of tcp")
    if directory.decode(directory.encode(found)) != found:
        raise AssertionError("another directory is written than was read")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Put one of the pieces that directories are made of somewhere."""
    pieces = [
        b'"tcp://',
        b'"shm://',
        b":65536",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b"null",
        b'"key":',
        b'"workers":',
        b"\xff",
    ]
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(pieces) + data[place + rng.randrange(4) :]


def seeds() -> dict[str, bytes]:
    """Return valid directories."""
    workers = (Entry("tcp://10.0.0.1:5000", _KEY), Entry("tcp://[fd00::2]:5001"))
    dealers = (Entry("tcp://dealer.example:50052", _KEY),)
    return {
        "empty": directory.encode(Directory(version=1)),
        "pool": directory.encode(Directory(version=1, workers=workers, dealers=dealers)),
    }
