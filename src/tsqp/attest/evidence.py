"""What ``/v1/attestation`` answers, on both sides of the wire."""

from __future__ import annotations

import base64
import binascii
from typing import Literal

import msgspec
from msgspec import Struct

from tsqp.errors import EvidenceError

Tee = Literal["sgx", "tdx", "none"]
Provable = Literal["sgx", "tdx"]
# A quote is 5 KB, and its certificates a few more.
MAX_EVIDENCE_BYTES = 256 << 10


class Evidence(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A quote, and the claims that its report data is made of.

    Attributes:
        tee: the kind of quote; ``none`` where there is none, while developing.
        quote: base64.
        claims: base64 of their bytes; see ``claims.Claims.encode``.
    """

    tee: Tee
    quote: str
    claims: str

    @staticmethod
    def of(tee: Tee, quote: bytes, claims: bytes) -> Evidence:
        """Return evidence to send."""
        return Evidence(tee=tee, quote=base64.b64encode(quote).decode(), claims=base64.b64encode(claims).decode())

    def quote_bytes(self) -> bytes:
        """Return the quote.

        Raises:
            EvidenceError: it is no base64.
        """
        return _plain(self.quote, "quote")

    def claims_bytes(self) -> bytes:
        """Return the claims' bytes.

        Raises:
            EvidenceError: they are no base64.
        """
        return _plain(self.claims, "claims")


def decode_evidence(raw: bytes) -> Evidence:
    """Read what a server answered.

    Raises:
        EvidenceError: that is no evidence.
    """
    if len(raw) > MAX_EVIDENCE_BYTES:
        raise EvidenceError(f"the server's evidence is {len(raw)} bytes; at most {MAX_EVIDENCE_BYTES} are read.")
    try:
        return msgspec.json.decode(raw, type=Evidence)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EvidenceError(f"what the server sent is no evidence of a TSQP server: {error}.") from error


def _plain(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise EvidenceError(f"the {name} in the server's evidence is not base64.") from None
