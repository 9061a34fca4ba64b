"""The directory of a pool: where its workers and dealers are now, as JSON. Who publishes it is not believed.

It says where a peer may be looked for, never who is trusted: keys that matter are in the enclave's own settings. So it
names tcp addresses only, since a path would choose among what lies on the enclave's machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from tsqp.errors import ConfigError, ProtocolError, printable
from tsqp.transport.keys import PUBLIC_SUFFIX, SECRET_SUFFIX, check_public
from tsqp.transport.urls import parse

MAX_BYTES = 1 << 16
MAX_PEERS = 256
_HOST = r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})"
Address = Annotated[str, Meta(max_length=270, pattern=rf"\Atcp://{_HOST}:[0-9]{{1,5}}\Z")]


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """A peer: where it listens, and the public key that it is said to hold, in z85; null for links in clear."""

    address: Address
    key: Annotated[str, Meta(max_length=40)] | None = None


class Directory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All peers of a pool, at most ``MAX_PEERS`` of each kind, no address twice."""

    version: Literal[1]
    workers: Annotated[tuple[Entry, ...], Meta(max_length=MAX_PEERS)] = ()
    dealers: Annotated[tuple[Entry, ...], Meta(max_length=MAX_PEERS)] = ()


def decode(text: bytes) -> Directory:
    """Read a directory.

    Args:
        text: JSON, of any origin.

    Raises:
        ProtocolError: it is longer than ``MAX_BYTES``, or not a directory.
    """
    if len(text) > MAX_BYTES:
        raise ProtocolError(f"the directory has more than {MAX_BYTES} bytes.")
    try:
        found = msgspec.json.decode(text, type=Directory)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the directory is not one of version 1: {printable(str(error))}.") from None
    _check(found)
    return found


def encode(directory: Directory) -> bytes:
    """Return a directory as JSON.

    Raises:
        ProtocolError: no enclave would take it.
    """
    text = msgspec.json.encode(directory)
    decode(text)
    return text


def _check(directory: Directory) -> None:
    """Refuse what the types cannot: an address that is none, one that is there twice, a key that is none or a file."""
    entries = (*directory.workers, *directory.dealers)
    keys = [entry.key for entry in entries if entry.key is not None]
    if any(key.endswith((PUBLIC_SUFFIX, SECRET_SUFFIX)) for key in keys):  # settings would take it for a file's name
        raise ProtocolError("the directory has a key that ends as the name of a key file does.")
    try:
        places = [parse(entry.address).url for entry in entries]
        for key in keys:
            check_public(key.encode())
    except ConfigError as error:
        raise ProtocolError(f"the directory has an entry that cannot be used: {printable(str(error))}") from None
    if twice := first_twice(places):
        raise ProtocolError(f"the directory names {printable(twice)} twice.")


def first_twice(names: Iterable[str]) -> str | None:
    """Return the first name that came before; None where each is there once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
