"""Meets workers and dealers: connects, compares protocol and model, and returns links that are ready for use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tsqp.config import EnclaveConfig
from tsqp.enclave.remote_ops import OpenOps
from tsqp.enclave.session import Expected, Role, Session, check_peer
from tsqp.errors import AbsentPeerError, TransportClosedError
from tsqp.meter import Meter
from tsqp.model.architecture import LlamaConfig, linear_groups
from tsqp.transport.base import ClientTransport
from tsqp.transport.client import open_client
from tsqp.transport.keys import KeyPair
from tsqp.transport.urls import check_clear, parse
from tsqp.wire import codec
from tsqp.wire.messages import Welcome

# How long to wait before looking again for a peer that is gone.
_PAUSE_S = 0.05
# Lets a test or the audit see what leaves; given the transport and returning one that passes everything on.
Wrap = Callable[[ClientTransport], ClientTransport]


@dataclass(frozen=True, slots=True)
class Link:
    """An open connection to a worker that holds the right model."""

    session: Session
    ops: OpenOps
    welcome: Welcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Where a worker or dealer is, and how it is recognised.

    Attributes:
        address: as people write it.
        key: its public key, 40 bytes of z85; None means a link in clear.
        own: this process's pair on an encrypted link; None makes one for each connection.
        wrap: applied to the transport.
    """

    address: str
    key: bytes | None = None
    own: KeyPair | None = None
    wrap: Wrap | None = None


def check_peer_link(peer: Peer, config: EnclaveConfig) -> None:
    """Refuse an address that is none, and a link in clear that would leave this machine.

    Raises:
        ConfigError: it is refused.
    """
    endpoint = parse(peer.address)
    if peer.key is None:
        check_clear(endpoint, insecure=config.insecure == "on")


def meet(peer: Peer, config: EnclaveConfig, expected: Expected, meter: Meter | None = None) -> tuple[Session, Welcome]:
    """Connect to a peer and check that it is the right one.

    Args:
        peer: where it is.
        config: timeouts.
        expected: what it must serve.
        meter: where the session's costs are counted.

    Raises:
        ConfigError: as ``check_peer_link`` does.
        PeerKeyError: what answers does not hold that key.
        KeyRefusedError: it does, and does not let this process in.
        TransportError: nothing answers there.
        ProtocolError, ModelMismatchError: what answers is not the right peer.
    """
    check_peer_link(peer, config)
    transport: ClientTransport = open_client(parse(peer.address), config.max_message_bytes, peer.key, peer.own)
    role: Role = "dealer" if expected.serves == "masks" else "worker"
    session = Session(peer.wrap(transport) if peer.wrap else transport, config.request_timeout_s, meter, role)
    try:
        welcome = session.hello(config.connect_timeout_s)
        check_peer(welcome, expected, session.peer)
    except BaseException:
        session.close()
        raise
    return session, welcome


def meet_again(
    peer: Peer, config: EnclaveConfig, expected: Expected, meter: Meter | None = None
) -> tuple[Session, Welcome]:
    """Connect to a peer whose link was lost: it may be starting again, and has ``connect_timeout_s`` to come back.

    Over tcp libzmq waits for who is not there; a socket or region of shared memory is missing meanwhile.

    Args and errors are those of ``meet``, but:

    Raises:
        TransportClosedError: nobody has listened there in this time.
    """
    deadline = time.monotonic() + config.connect_timeout_s
    while True:
        try:
            return meet(peer, config, expected, meter)
        except (AbsentPeerError, TransportClosedError) as error:
            if time.monotonic() >= deadline:
                raise TransportClosedError(
                    f"the link to {peer.address} was lost, and nobody has answered there for "
                    f"{config.connect_timeout_s:g} s since: {error}"
                ) from error
        time.sleep(_PAUSE_S)


def expected_open(config: EnclaveConfig, architecture: LlamaConfig, digest: str) -> Expected:
    """Return what a worker must say that serves a model at the level `open`."""
    return Expected(
        serves="open",
        digest=digest,
        dtype=config.dtype,
        groups=linear_groups(architecture),
        wire_dtype=config.wire_dtype or config.dtype,
    )


@contextmanager
def connect(
    peer: Peer,
    config: EnclaveConfig,
    architecture: LlamaConfig,
    digest: str,
    meter: Meter | None = None,
    *,
    again: bool = False,
) -> Iterator[Link]:
    """Connect to a worker at the level `open` for the time of a ``with`` block.

    Args:
        peer: where it is.
        config: timeouts, dtype and wire dtype.
        architecture: the model's architecture.
        digest: the model's digest.
        meter: where the session's costs are counted.
        again: whether its link was lost; then it has some time to come back.

    Raises:
        TsqpError: as ``meet``, or ``meet_again``.
    """
    expected = expected_open(config, architecture, digest)
    session, welcome = (meet_again if again else meet)(peer, config, expected, meter)
    try:
        yield Link(
            session, OpenOps(session, architecture, codec.TORCH_DTYPES[config.wire_dtype or config.dtype]), welcome
        )
    finally:
        session.close()
