"""CURVE key pairs, in the certificate files of the ZeroMQ ecosystem (``zmq.auth``): NAME.key and NAME.key_secret.

A public key names a peer: whoever is given it talks to the holder of its secret key or to nobody. Keys are 32 bytes;
in files, in settings and here they are z85, 40 characters (ZeroMQ RFC 32). No message of this module shows a secret.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.auth
import zmq.utils.z85

from tsqp.errors import ConfigError, InternalError, SetupError
from tsqp.transport.sockets import owner_only

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"  # noqa: S105  a file name
_Z85_BYTES = 40
_KEY_BYTES = 32
# pyzmq writes some 400 bytes.
_MAX_FILE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both keys as 40 bytes of z85. Its repr shows the public key only; it cannot be pickled.

    Raises:
        SetupError: this libzmq has no CURVE.
        ConfigError: not two keys, or not two that belong together.
    """

    public: bytes
    secret: bytes = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        _require_curve()
        if not (_is_key(self.public) and _is_key(self.secret)) or zmq.curve_public(self.secret) != self.public:
            raise ConfigError("not a CURVE key pair: expected a secret key and the public key that belongs to it.")

    def __reduce__(self) -> tuple[object, ...]:
        raise InternalError("a key pair must not leave its process.")


def ephemeral() -> KeyPair:
    """Return a fresh pair that is never stored.

    Raises:
        SetupError: this libzmq has no CURVE.
    """
    _require_curve()
    return KeyPair(*zmq.curve_keypair())


def create(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a key pair and store it.

    Args:
        directory: where; it must exist.
        name: the files are NAME.key and NAME.key_secret.

    Returns:
        The paths of the public and of the secret file. The secret one has had mode 0600 from its first moment.

    Raises:
        ConfigError: the name is no plain file name.
        SetupError: one of the files exists, the directory cannot be written, or this libzmq has no CURVE.
    """
    _require_curve()
    if Path(name).name != name or name.startswith(".") or not name or not name.isprintable():
        raise ConfigError(f"key name {name!r}: expected a plain file name; --out chooses the directory.")
    public, secret = directory / f"{name}{PUBLIC_SUFFIX}", directory / f"{name}{SECRET_SUFFIX}"
    with ExitStack() as undo:
        try:
            public.open("x").close()
            undo.callback(public.unlink)
            with owner_only():
                secret.open("x").close()
                undo.callback(secret.unlink)
                zmq.auth.create_certificates(directory, name)  # into the two files: their modes stay
        except FileExistsError as error:
            raise SetupError(
                f"{error.filename} exists already and is never overwritten: choose another name."
            ) from None
        except OSError as error:
            raise SetupError(f"cannot write keys to {directory}: {error.strerror}.") from error
        undo.pop_all()
    return public, secret


def load_secret(path: str | Path) -> KeyPair:
    """Read a key pair from NAME.key_secret.

    Raises:
        SetupError: the file is missing, malformed, readable by others or without a secret key, or this libzmq has no
            CURVE.
    """
    file = Path(path)
    public, secret = _read(file)
    if secret is None:
        raise SetupError(f"{file} holds no secret key: give {file.stem}{SECRET_SUFFIX}, which was made beside it.")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise SetupError(f"{file} can be read by others (mode {mode:04o}): run 'chmod 600' on it, or make a new key.")
    return KeyPair(public, secret)


def load_public(path_or_key: str | Path) -> bytes:
    """Return a public key: of a file NAME.key, the public part of NAME.key_secret, or given as 40 characters of z85.

    A text of 40 characters that is z85 is a key unless it ends in .key or .key_secret.

    Raises:
        SetupError: neither a key nor such a file, or this libzmq has no CURVE.
    """
    text = str(path_or_key)
    if _is_key(text) and not text.endswith((PUBLIC_SUFFIX, SECRET_SUFFIX)):
        return check_public(text.encode())
    return read_public(Path(text))


def load_allowed(paths_or_keys: Iterable[str | Path]) -> frozenset[bytes] | None:
    """Return the public keys of an allow-list, each as ``load_public`` takes it; None, which allows all, for no list.

    Raises:
        SetupError: as ``load_public`` does.
    """
    return frozenset(map(load_public, paths_or_keys)) or None


def read_public(file: Path) -> bytes:
    """Return the public key in a certificate file of either kind.

    Raises:
        SetupError: the file is missing or malformed, or this libzmq has no CURVE.
    """
    return _read(file)[0]


def check_public(key: bytes) -> bytes:
    """Return a public key as it is.

    Raises:
        SetupError: this libzmq has no CURVE.
        ConfigError: not 40 bytes of z85.
    """
    _require_curve()
    if not _is_key(key):
        raise ConfigError(f"a public key of {len(key)} bytes: expected {_Z85_BYTES} of z85.")
    return key


def _read(file: Path) -> tuple[bytes, bytes | None]:
    """Return the public key in a file, and the secret one if there is one; both valid and belonging together."""
    _require_curve()
    if file.suffix not in (PUBLIC_SUFFIX, SECRET_SUFFIX) and not _is_file(file):
        # It may be a key, mistyped or secret, that was given in place of its file: do not quote it.
        raise SetupError(
            "a key file does not exist: expected NAME.key_secret for an own key, NAME.key or the 40 characters that it "
            "holds for a peer's. 'tsqp keys new NAME' makes both files."
        )
    malformed = SetupError(f"{file} is not a ZeroMQ certificate: expected one made by 'tsqp keys new' or pyzmq.")
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_FILE_BYTES:
            raise malformed
        public, secret = zmq.auth.load_certificate(file)
    except OSError as error:
        raise SetupError(f"cannot read the key file {file}: {error.strerror or 'it is gone'}.") from error
    except (ValueError, IndexError):
        raise malformed from None
    if not _is_key(public):
        raise malformed
    if secret is not None and (not _is_key(secret) or zmq.curve_public(secret) != public):
        raise malformed
    return public, secret


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _is_key(text: str | bytes) -> bool:
    """Tell whether this is z85 of 32 bytes."""
    try:
        return len(zmq.utils.z85.decode(text)) == _KEY_BYTES
    except (KeyError, ValueError, struct.error):
        return False


def _require_curve() -> None:
    if not zmq.has("curve"):
        raise SetupError(
            "this libzmq was built without CURVE, so links cannot be encrypted: install pyzmq from its wheel."
        )
