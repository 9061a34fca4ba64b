"""What a server says of itself, and how its report binds that to its TLS key and to the asker's nonce.

A quote proves one thing about the code that runs: that it put 64 bytes of its choice, the report data, into the report
that the processor signed. Here they are

    SHA-512(tag | len, SHA-256(public key) | len, nonce | len, claims)

with lengths as 8 bytes, big-endian, so that no two different inputs are the same bytes. The public key is the
DER SubjectPublicKeyInfo of the TLS key that the enclave made; claims are the bytes that travel, not a re-encoding of
them. Whoever sees a fresh nonce come back so knows that this very enclave holds that key now and stands by the claims.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from tsqp.errors import EvidenceError, InternalError

NONCE_BYTES = 32
REPORT_DATA_BYTES = 64
_TAG = b"tsqp attestation 1"
_LENGTH_BYTES = 8
_MAX_CLAIMS_BYTES = 64 << 10


class Claims(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a policy may pin.

    Attributes:
        version: of TSQP.
        level: the protection level.
        masks: at `masked`, who computes mask products: ``enclave`` or ``dealers``; empty elsewhere.
        workers: the public key of each worker, z85, in order; empty for one whose link is in clear. Of a directory's
            workers: the keys of which each must hold one, or an empty one where any may serve, at `masked`.
        dealers: the public key of each dealer, z85, in order.
        model_digest: 64 hexadecimal digits; of a packed model, its manifest's.
    """

    version: str
    level: str
    masks: str
    workers: tuple[str, ...]
    dealers: tuple[str, ...]
    model_digest: str

    def encode(self) -> bytes:
        """Return them as they travel: JSON, keys in order, nothing between them."""
        return msgspec.json.encode(self, order="sorted")


def decode_claims(raw: bytes) -> Claims:
    """Read claims that came from a server.

    Raises:
        EvidenceError: they are no claims.
    """
    if len(raw) > _MAX_CLAIMS_BYTES:
        raise EvidenceError(f"the server's claims are {len(raw)} bytes; at most {_MAX_CLAIMS_BYTES} are read.")
    try:
        return msgspec.json.decode(raw, type=Claims)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EvidenceError(f"the server's claims are not those of a TSQP server: {error}.") from error


def report_data(public_key: bytes, nonce: bytes, claims: bytes) -> bytes:
    """Return the 64 bytes that a report must hold.

    Args:
        public_key: of TLS, DER SubjectPublicKeyInfo.
        nonce: the asker's, ``NONCE_BYTES``.
        claims: as they travel.

    Raises:
        InternalError: a nonce of another length: the edge of the process must have refused it.
    """
    if len(nonce) != NONCE_BYTES:
        raise InternalError(f"a nonce of {len(nonce)} bytes; expected {NONCE_BYTES}.")
    return _digest((hashlib.sha256(public_key).digest(), nonce, claims))


def _digest(parts: Sequence[bytes]) -> bytes:
    total = hashlib.sha512(_TAG)
    for part in parts:
        total.update(len(part).to_bytes(_LENGTH_BYTES, "big"))
        total.update(part)
    return total.digest()
