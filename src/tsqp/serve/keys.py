"""API keys: who may ask. A file holds their salted hashes, one ``name:salt:hash`` a line; no key is ever stored.

Keys are 256 random bits, so one SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from tsqp.errors import ConfigError, SetupError

_PREFIX = "tsqp-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_LINE = re.compile(r"(?P<name>[^:]+):(?P<salt>[0-9a-f]{32}):(?P<hash>[0-9a-f]{64})")
_KEY_BYTES = 32
_SALT_BYTES = 16
_MAX_FILE_BYTES = 1 << 24
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The keys that are accepted, by name."""

    hashes: dict[str, tuple[bytes, bytes]] = field(repr=False)

    def owner(self, key: str) -> str | None:
        """Return the name of a key, or None; the time it takes does not depend on which hash is near."""
        found = None
        content = key.encode(errors="surrogateescape")
        for name, (salt, expected) in self.hashes.items():
            if hmac.compare_digest(hashlib.sha256(salt + content).digest(), expected):
                found = name
        return found


def read_keys(path: Path) -> ApiKeys:
    """Read a file of keys.

    Raises:
        SetupError: it is missing, malformed, empty, or can be written by others.
    """
    try:
        if path.stat().st_mode & _WRITABLE_BY_OTHERS:
            raise SetupError(f"{path} can be written by others, who could add keys: run 'chmod 600' on it.")
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode("ascii", errors="replace")
    except OSError as error:
        raise SetupError(
            f"the API keys in {path} cannot be read: {error.strerror}. "
            "'tsqp serve --api-keys FILE --new-api-key NAME' makes one."
        ) from error
    hashes: dict[str, tuple[bytes, bytes]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if not match or not _NAME.fullmatch(match["name"]):
            raise SetupError(f"{path}, line {number}: expected NAME:SALT:HASH, as --new-api-key writes it.")
        if match["name"] in hashes:
            raise SetupError(f"{path}, line {number}: {match['name']} is there twice; a name has one key.")
        hashes[match["name"]] = (bytes.fromhex(match["salt"]), bytes.fromhex(match["hash"]))
    if not hashes:
        raise SetupError(f"{path} holds no key: nobody could ask anything. Add one with --new-api-key NAME.")
    return ApiKeys(hashes)


def new_key(path: Path, name: str) -> str:
    """Make a key, append its hash to a file (made with mode 0600), and return the key: it is not stored.

    Raises:
        ConfigError: the name is taken or malformed.
        SetupError: the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"key name {name[:64]!r}: expected letters, digits and ._@- , at most 64.")
    if path.exists() and path.stat().st_size and name in read_keys(path).hashes:
        raise ConfigError(f"{path} has a key named {name}: choose another name, or remove that line first.")
    key = _PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    salt = secrets.token_bytes(_SALT_BYTES)
    line = f"{name}:{salt.hex()}:{hashlib.sha256(salt + key.encode()).hexdigest()}\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="ascii") as file:
            file.write(line)
    except OSError as error:
        raise SetupError(f"cannot write {path}: {error.strerror}.") from error
    return key
