"""Endpoints as people write them, turned into the one form that sockets take."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from ipaddress import ip_address

from tsqp.errors import ConfigError

SCHEMES = ("tcp", "ipc", "shm")
_MAX_PORT = 65535
_MAX_PORT_DIGITS = 5
# sun_path of a UNIX socket holds 108 bytes, one of them the terminator.
_MAX_IPC_PATH = 107
# Where named regions are, and nothing else of ours.
_DEV_SHM = "/dev/shm/"  # noqa: S108


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address: ``tcp`` with host and port, or ``ipc`` or ``shm`` with the path of a socket or a region."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def ip(self) -> str:
        """The host for a socket. ``localhost`` is 127.0.0.1 here, since it does not resolve inside Gramine."""
        return "127.0.0.1" if self.host == "localhost" else self.host

    @property
    def url(self) -> str:
        """The address for a ZeroMQ socket."""
        if self.path:
            return f"{self.scheme}://{self.path}"
        return f"tcp://{f'[{self.ip}]' if ':' in self.ip else self.ip}:{self.port}"

    @property
    def is_named_region(self) -> bool:
        """Whether this is shared memory under a name in /dev/shm, and not arranged over a socket."""
        return self.scheme == "shm" and self.path.startswith(_DEV_SHM)

    @property
    def stays_on_this_machine(self) -> bool:
        """Whether bytes sent here never reach a network: ipc, shm, or tcp on a loopback address."""
        if self.path or self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return self.url if self.path else f"{self.host}:{self.port}"


def check_clear(endpoint: Endpoint, *, insecure: bool) -> None:
    """Refuse a link without encryption that leaves this machine, unless it was asked for by that name.

    Args:
        endpoint: where a link without a key would listen, or lead to.
        insecure: what the user said (``--insecure``).

    Raises:
        ConfigError: it is refused.
    """
    if not (insecure or endpoint.stays_on_this_machine):
        raise ConfigError(
            f"{endpoint} is beyond this machine, and without a key everything would cross the network in clear: "
            "make one ('tsqp keys new') and give it to both sides (--key where it listens, --worker-key or "
            "--dealer-key where it is used), or say --insecure (TSQP_INSECURE=on)."
        )


def parse(text: str) -> Endpoint:
    """Read an address: ``host:port`` (which means tcp), ``tcp://host:port``, ``ipc:///path`` or ``shm:///path``.

    Raises:
        ConfigError: anything else.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "tcp", text
    if scheme == "shm" and sys.platform != "linux":
        raise ConfigError(f"endpoint {text!r}: shm needs Linux; use ipc.")
    if scheme in ("ipc", "shm"):
        if not rest.startswith("/"):
            raise ConfigError(
                f"endpoint {text!r}: {scheme} needs an absolute path, as in {scheme}:///run/user/1000/tsqp/worker."
            )
        if len(rest.encode()) > _MAX_IPC_PATH:
            raise ConfigError(
                f"endpoint {text!r}: a socket path has at most {_MAX_IPC_PATH} bytes; use a shorter directory."
            )
        name = rest.removeprefix(_DEV_SHM)
        if scheme == "shm" and name != rest and ("/" in name or name.strip(".") == "" or not name.isprintable()):
            raise ConfigError(
                f"endpoint {text!r}: expected a plain name after {_DEV_SHM}, as in shm://{_DEV_SHM}tsqp-worker."
            )
        return Endpoint(scheme, path=rest)
    if scheme != "tcp":
        raise ConfigError(f"endpoint {text!r}: unknown scheme {scheme!r}; known: {', '.join(SCHEMES)}.")
    host, colon, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    digits = port.isascii() and port.isdigit() and len(port) <= _MAX_PORT_DIGITS
    if not colon or not host or {"[", "]"} & set(host) or not digits or not 0 < int(port) <= _MAX_PORT:
        raise ConfigError(
            f"endpoint {text!r}: expected host:port with a port from 1 to {_MAX_PORT}, as in localhost:50051."
        )
    return Endpoint("tcp", host=host, port=int(port))
