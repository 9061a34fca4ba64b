"""Where a worker and enclaves of one user meet on one machine without being told where: over shared memory.

A worker that is given no address has, beside its port, a socket named after that port, in a directory that only its
user can enter. Enclaves that are given no address, or the worker's on loopback, look there first.
"""

from __future__ import annotations

import os
import socket
import sys

from tsqp.errors import SetupError
from tsqp.paths import check_private, make_private, user_socket_directory
from tsqp.transport.urls import Endpoint, parse


def make_nearby(port: int) -> Endpoint | None:
    """Return where a worker with this port listens for its user's enclaves, in a directory made for that.

    Returns:
        None where there is no shared memory: it needs Linux.

    Raises:
        SetupError: the directory cannot be made, is not private to this user, or has too long a name; or there are no
            such sockets, as under Gramine.
    """
    if sys.platform != "linux":
        return None
    try:
        _new_socket().close()
    except OSError as error:
        raise SetupError(f"this system has no UNIX sockets that keep messages apart ({error.strerror}).") from error
    make_private(user_socket_directory())
    return _endpoint(port)


def find_nearby(port: int) -> Endpoint | None:
    """Return where this user's worker with this port is reached; None where nobody listens.

    Raises:
        SetupError: the directory is not private to this user.
    """
    if sys.platform != "linux" or not os.path.lexists(user_socket_directory()):
        return None
    check_private(user_socket_directory())
    endpoint = _endpoint(port)
    try:
        with _new_socket() as probe:
            return None if probe.connect_ex(endpoint.path) else endpoint
    except OSError:
        return None


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _endpoint(port: int) -> Endpoint:
    return parse(f"shm://{user_socket_directory()}/worker-{port}")
