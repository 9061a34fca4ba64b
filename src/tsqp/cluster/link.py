"""Meets Ray: whether it is there, of which version, and whether it can be reached. Imports it only when asked."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from tsqp.errors import SetupError, TransportError, printable
from tsqp.transport.urls import parse

NAMESPACE = "tsqp"
# The only ones that were tried.
LEAST_VERSION = (2, 60)
_NEXT_MAJOR = 3
CONNECT_S = 5.0


def require_ray() -> str:
    """Return the version of Ray that is installed.

    Raises:
        SetupError: none is, or one that cannot be used.
    """
    try:
        found = version("ray")
    except PackageNotFoundError as error:
        raise SetupError("ray is not installed: run 'pip install tsqp[ray]'.") from error
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if not LEAST_VERSION <= numbers < (_NEXT_MAJOR,):
        least = ".".join(map(str, LEAST_VERSION))
        raise SetupError(
            f"ray {found} is installed; expected {least} or later, below {_NEXT_MAJOR}: run 'pip install tsqp[ray]'."
        )
    return found


@contextmanager
def connected(address: str | None) -> Iterator[str]:
    """Use a Ray cluster for the time of a ``with`` block.

    Args:
        address: HOST:PORT of its head, of which this machine must be a node; None starts a Ray of this process, on this
            machine, which ends with the block.

    Yields:
        The cluster's address.

    Raises:
        SetupError: Ray is missing, of another version than the cluster's, or has no token for it.
        TransportError: nobody answers there.
    """
    require_ray()
    if address is not None:
        _knock(address)
    import ray  # noqa: PLC0415  of an extra

    try:
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise _explained(address, error) from error
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    endpoint = parse(address)
    if endpoint.scheme != "tcp":
        raise SetupError(f"{printable(address)}: expected the address of a Ray cluster's head, as in 10.0.0.1:6379.")
    try:
        socket.create_connection((endpoint.ip, endpoint.port), CONNECT_S).close()
    except OSError as error:
        raise TransportError(
            f"no Ray cluster answers at {endpoint} within {CONNECT_S:g} s ({error.strerror or type(error).__name__}): "
            "give the address of its head (--address), and start it with 'ray start --head'."
        ) from error


def _explained(address: str | None, error: Exception) -> SetupError | TransportError:
    """Return an error of ours for what Ray raised when it was to be joined or started."""
    where, chain = address or "this machine", str(error)
    cause = error.__cause__ or error.__context__
    while cause is not None:
        chain += f" {cause}"
        cause = cause.__cause__ or cause.__context__
    if "ersion mismatch" in chain:
        return SetupError(
            f"the Ray cluster at {where} has another version of Ray or Python than this process: "
            f"{printable(' '.join(str(error).split()))}"
        )
    if "oken" in chain and "uthentica" in chain:
        return SetupError(
            f"the Ray cluster at {where} asks for a token that is not here: copy ~/.ray/auth_token from its head, or "
            "set RAY_AUTH_TOKEN. RAY_AUTH_MODE=disabled is for a cluster that has none, where whoever reaches it runs "
            "code."
        )
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return TransportError(f"Ray at {where} cannot be used: {printable(first)}")
