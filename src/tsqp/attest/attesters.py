"""Where quotes come from: Gramine's pseudo-files, a TDX guest's configfs, or nowhere.

Gramine-SGX: https://gramine.readthedocs.io/en/stable/attestation.html, "Low-level /dev/attestation interface". TDX: the
kernel's Documentation/ABI/testing/configfs-tsm (configfs-tsm-report since 6.16).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from tsqp.attest.claims import REPORT_DATA_BYTES
from tsqp.attest.evidence import Tee
from tsqp.errors import ConfigError, InternalError, SetupError
from tsqp.tee import tee_name

GRAMINE = Path("/dev/attestation")
CONFIGFS_TSM = Path("/sys/kernel/config/tsm/report")
_TDX_PROVIDER = "tdx_guest"
_BACKENDS = {"SGX": "gramine", "TDX": "tdx", None: "off"}
# Another process may be at the same entry of configfs; then it is asked anew.
_TSM_ATTEMPTS = 5


class Attester(Protocol):
    """Makes quotes of this process. Thread-safe."""

    tee: Tee

    def quote(self, data: bytes) -> bytes:
        """Return a quote whose report holds 64 bytes of data; empty where there is no TEE.

        Raises:
            SetupError: the platform gives none.
        """


class GramineAttester:
    """Quotes of a Gramine-SGX enclave.

    Args:
        directory: Gramine's pseudo-files.

    Raises:
        SetupError: they are not there, or the manifest switched attestation off.
    """

    tee: Tee = "sgx"

    def __init__(self, directory: Path = GRAMINE) -> None:
        self._directory = directory
        # What is written and what is read then are one state of the process.
        self._lock = threading.Lock()
        kind = _read(directory / "attestation_type", "is this process running under gramine-sgx?").decode().strip()
        if kind != "dcap":
            raise SetupError(
                f'Gramine\'s remote attestation is {kind!r}: the manifest must say sgx.remote_attestation = "dcap".'
            )

    def quote(self, data: bytes) -> bytes:
        """See ``Attester.quote``."""
        _require_length(data)
        with self._lock:
            _write(self._directory / "user_report_data", data)
            return _read(self._directory / "quote", "does the host run the AESM service, and has it a PCK certificate?")


class TdxAttester:
    """Quotes of a TDX guest.

    Args:
        directory: where configfs offers reports.

    Raises:
        SetupError: it does not.
    """

    tee: Tee = "tdx"

    def __init__(self, directory: Path = CONFIGFS_TSM) -> None:
        self._directory = directory
        if not directory.is_dir():
            raise SetupError(
                f"{directory} is missing: a TDX guest offers it with Linux 6.7 or later, the module tdx_guest loaded, "
                "and configfs mounted where this process sees it."
            )

    def quote(self, data: bytes) -> bytes:
        """See ``Attester.quote``. ``generation`` tells whether somebody else wrote to the entry meanwhile."""
        _require_length(data)
        for _ in range(_TSM_ATTEMPTS):
            with self._entry() as entry:
                _write(entry / "inblob", data)
                expected = self._generation(entry)
                quote = _read(entry / "outblob", "does the host run a quote generation service?")
                provider = _read(entry / "provider", "").decode(errors="replace").strip()
                if self._generation(entry) != expected:
                    continue
            if provider != _TDX_PROVIDER:
                raise SetupError(f"{self._directory} gives reports of {provider}, not of {_TDX_PROVIDER}.")
            return quote
        raise SetupError(f"{self._directory}: others keep writing to this process's entry.")

    @staticmethod
    def _generation(entry: Path) -> bytes:
        return _read(entry / "generation", "")

    @contextlib.contextmanager
    def _entry(self) -> Iterator[Path]:
        entry = self._directory / f"tsqp-{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        try:
            entry.mkdir(mode=0o700)
        except OSError as error:
            raise SetupError(f"cannot make {entry}: {error.strerror}. A TDX guest lets root do that.") from error
        try:
            yield entry
        finally:
            with contextlib.suppress(OSError):
                entry.rmdir()


class NoAttester:
    """None, for development: what it gives proves nothing, and every verifier refuses it."""

    tee: Tee = "none"

    def quote(self, data: bytes) -> bytes:
        """See ``Attester.quote``."""
        _require_length(data)
        return b""


def attester_for(backend: str) -> Attester | None:
    """Return what makes quotes; None where nothing is to be attested.

    Args:
        backend: ``gramine``, ``tdx``, ``none``, ``off``, or ``auto``: by the TEE that this process is in, else ``off``.

    Raises:
        SetupError: the TEE is not there, or gives no quotes.
        ConfigError: there is no such back-end.
    """
    match _BACKENDS.get(tee_name(), "off") if backend == "auto" else backend:
        case "gramine":
            return GramineAttester()
        case "tdx":
            return TdxAttester()
        case "none":
            return NoAttester()
        case "off":
            return None
        case other:
            raise ConfigError(f"attestation {other}: expected auto, off, none, gramine or tdx.")


def _require_length(data: bytes) -> None:
    if len(data) != REPORT_DATA_BYTES:
        raise InternalError(f"{len(data)} bytes of report data; expected {REPORT_DATA_BYTES}.")


def _read(file: Path, hint: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SetupError(f"cannot read {file} ({error.strerror}){': ' + hint if hint else '.'}") from error


def _write(file: Path, data: bytes) -> None:
    """Write all of it with one call: it becomes valid at once."""
    try:
        with file.open("wb", buffering=0) as opened:
            opened.write(data)
    except OSError as error:
        raise SetupError(f"cannot write {file} ({error.strerror}).") from error
