"""The server's side of attestation: a TLS key made in this process, and evidence for whoever asks with a nonce."""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import ssl
import tempfile
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tsqp import __version__
from tsqp.attest.attesters import Attester
from tsqp.attest.claims import NONCE_BYTES, Claims, report_data
from tsqp.attest.evidence import Evidence
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.errors import InternalError, SetupError
from tsqp.serve.errors import ApiError
from tsqp.transport.keys import load_public

# The key lives as long as the process, whose clock the host sets: the certificate's dates mean nothing.
_NOT_BEFORE, _NOT_AFTER = (dt.datetime(year, 1, 1, tzinfo=dt.timezone.utc) for year in (2020, 2049))
# How many may ask at once.
MAX_ASKING = 64
_NONCE = re.compile(f"[0-9a-f]{{{2 * NONCE_BYTES}}}")


class Identity:
    """A TLS key of this process, which never leaves it, and what proves whose it is.

    Args:
        attester: makes quotes.
    """

    def __init__(self, attester: Attester) -> None:
        self._attester = attester
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._public_key = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._claims: bytes | None = None
        # A quote takes milliseconds of the platform's time, and anybody may ask: one at a time, and few in line.
        self._turn = asyncio.Lock()
        self._asking = 0

    def __repr__(self) -> str:
        return f"Identity({self._attester.tee}, key not shown)"

    def __reduce__(self) -> tuple[object, ...]:
        raise InternalError("the server's TLS key must not leave its process.")

    def claim(self, claims: Claims) -> None:
        """Say what the server stands by, once that is known."""
        self._claims = claims.encode()

    def context(self) -> ssl.SSLContext:
        """Return a server's context with this key and a certificate that it signed itself.

        OpenSSL reads keys from files only, so for a moment there is one that only this user can read; in an enclave
        temporary files are in its own memory.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        key = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "tls.pem"
            file.write_bytes(key + self._certificate().public_bytes(serialization.Encoding.PEM))
            context.load_cert_chain(file)
        return context

    def _certificate(self) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tsqp enclave")])
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    async def evidence(self, nonce: str | None) -> bytes:
        """Return evidence for a nonce, as JSON.

        Args:
            nonce: 64 hexadecimal digits, of the asker's choice.

        Raises:
            ApiError: 400 no such nonce; 503 the platform gives no quote now, or too many wait for theirs.
        """
        if nonce is None or not _NONCE.fullmatch(nonce):
            raise ApiError(
                400,
                f"give a fresh nonce: /v1/attestation?nonce= and {2 * NONCE_BYTES} lowercase hexadecimal digits.",
                code="invalid_nonce",
                param="nonce",
            )
        if self._claims is None:
            raise InternalError("a server was asked for evidence before it had said what it stands by.")
        data = report_data(self._public_key, bytes.fromhex(nonce), self._claims)
        if self._asking >= MAX_ASKING:
            raise ApiError(503, f"{MAX_ASKING} others wait for their quotes: ask again in a moment.", code="no_quote")
        self._asking += 1
        try:
            async with self._turn:
                quote = await asyncio.to_thread(self._attester.quote, data)
        except SetupError as error:
            raise ApiError(503, f"no quote can be made now: {error}", code="no_quote") from error
        finally:
            self._asking -= 1
        return msgspec.json.encode(Evidence.of(self._attester.tee, quote, self._claims))


def claims_of(enclave: EnclaveConfig, engine: EngineConfig, model_digest: str) -> Claims:
    """Return what a server with these settings stands by.

    Args:
        enclave: its level, mask source, dealers and single worker.
        engine: its workers, if there are several, or the keys of which those of a directory must hold one.
        model_digest: of the model that it has loaded.

    Raises:
        SetupError: a key cannot be read.
    """
    worker_keys = engine.worker_keys or ((enclave.worker_key,) if enclave.worker_key else ())
    workers = 0 if enclave.level == "local" else len(engine.workers) or 1
    dealers = len(enclave.dealers) or len(enclave.dealer_keys)  # of a directory's only the keys are known
    return Claims(
        version=__version__,
        level=enclave.level,
        masks=("dealers" if dealers else "enclave") if enclave.level == "masked" else "",
        workers=_public(worker_keys, workers),
        dealers=_public(enclave.dealer_keys, dealers),
        model_digest=model_digest,
    )


def _public(keys: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(load_public(key).decode() for key in keys) or ("",) * count
