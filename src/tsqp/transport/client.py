"""The enclave's end of a link, by the endpoint's scheme."""

from __future__ import annotations

from tsqp.errors import ConfigError
from tsqp.transport.base import ClientTransport
from tsqp.transport.keys import KeyPair
from tsqp.transport.urls import Endpoint
from tsqp.transport.zeromq import ZmqClient


def open_client(
    endpoint: Endpoint, max_message_bytes: int, server_key: bytes | None = None, own: KeyPair | None = None
) -> ClientTransport:
    """Connect to a worker.

    Args:
        endpoint: where it listens.
        max_message_bytes: the longest message that either side may send.
        server_key: the public key that the worker must hold, 40 bytes of z85; the link is encrypted then.
        own: this side's pair on such a link; else one is made for it.

    Raises:
        ConfigError: a key for shared memory, or one that is none.
        SetupError: the address cannot be connected to.
    """
    if endpoint.scheme == "shm":
        if server_key is not None:
            raise ConfigError(f"{endpoint}: shared memory carries no encryption; with a key use tcp or ipc.")
        from tsqp.transport import polled, shm  # noqa: PLC0415  Linux only

        connect = polled.connect_named if endpoint.is_named_region else shm.connect_socket
        return connect(endpoint, max_message_bytes)
    return ZmqClient(endpoint, max_message_bytes, server_key, own)
