"""The enclave's end of a link, by the endpoint's scheme."""

from __future__ import annotations

from tsqp.transport.base import ClientTransport
from tsqp.transport.urls import Endpoint
from tsqp.transport.zeromq import ZmqClient


def open_client(endpoint: Endpoint, max_message_bytes: int) -> ClientTransport:
    """Connect to a worker.

    Args:
        endpoint: where it listens.
        max_message_bytes: the longest message that either side may send.

    Raises:
        SetupError: the address cannot be connected to.
    """
    if endpoint.scheme == "shm":
        from tsqp.transport.shm import ShmClient  # noqa: PLC0415  Linux only

        return ShmClient(endpoint, max_message_bytes)
    return ZmqClient(endpoint, max_message_bytes)
