"""Collateral: what Intel publishes to verify quotes with, from a file or from a caching service (PCCS)."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tsqp.attest.policy import Policy
from tsqp.errors import CollateralError, TransportError, printable

_MAX_FILE_BYTES = 4 << 20
_PCCS_TIMEOUT_S = 30.0
# Of a list that does not say until when it is.
_NEVER_VALID = dt.datetime(1970, 1, 1, tzinfo=dt.timezone.utc)


def collateral_for(policy: Policy, quote: bytes) -> dcap_qvl.QuoteCollateralV3:
    """Return the collateral that a policy names.

    Args:
        policy: says where it is.
        quote: a service is asked for that of this quote's platform; it must be one that can be parsed.

    Raises:
        CollateralError: the file is missing or malformed, or the service does not know the platform.
        TransportError: the service does not answer.
    """
    if policy.collateral_file is not None:
        return read_collateral(policy.collateral_file)
    return _fetched(policy.pccs or "", quote)


def read_collateral(path: Path) -> dcap_qvl.QuoteCollateralV3:
    """Read collateral from a file of JSON.

    Raises:
        CollateralError: it is missing or malformed.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise CollateralError(f"{path} has more than {_MAX_FILE_BYTES} bytes: it is no collateral.")
        return dcap_qvl.QuoteCollateralV3.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CollateralError(f"cannot read the collateral {path}: {error.strerror}.") from error
    except ValueError as error:
        raise CollateralError(f"{path} is no collateral of a quote: {reason_of(error)}.") from error


def read_root(path: Path) -> bytes:
    """Read a root certificate, PEM or DER; return it as DER.

    Raises:
        CollateralError: it is missing or no certificate.
    """
    try:
        raw = path.read_bytes()
        pem = raw.lstrip().startswith(b"-----BEGIN")
        certificate = x509.load_pem_x509_certificate(raw) if pem else x509.load_der_x509_certificate(raw)
    except OSError as error:
        raise CollateralError(f"cannot read the root certificate {path}: {error.strerror}.") from error
    except (ValueError, x509.InvalidVersion) as error:
        raise CollateralError(f"{path} is no certificate, neither PEM nor DER.") from error
    return certificate.public_bytes(Encoding.DER)


def check_valid(collateral: dcap_qvl.QuoteCollateralV3, now: dt.datetime) -> None:
    """Refuse collateral that has expired: what is revoked since then is not in it.

    The verifier refuses it as well; this says what to do.

    Raises:
        CollateralError: it has, or says nothing of it.
    """
    for name, ends in _ends(collateral).items():
        if ends < now:
            raise CollateralError(
                f"the collateral's {name} expired on {ends:%Y-%m-%d}: fetch it anew, or name a collateral.pccs."
            )


def _ends(collateral: dcap_qvl.QuoteCollateralV3) -> dict[str, dt.datetime]:
    try:
        found = {
            "TCB info": _next_update(collateral.tcb_info),
            "QE identity": _next_update(collateral.qe_identity),
        }
        for name, der in (("root CRL", collateral.root_ca_crl), ("PCK CRL", collateral.pck_crl)):
            found[name] = x509.load_der_x509_crl(bytes(der)).next_update_utc or _NEVER_VALID
    except (ValueError, KeyError, TypeError, RecursionError, x509.InvalidVersion) as error:
        raise CollateralError("the collateral does not say until when it is valid: fetch it anew.") from error
    return found


def _next_update(text: str) -> dt.datetime:
    value: Any = json.loads(text)
    found = dt.datetime.fromisoformat(str(value["nextUpdate"]).replace("Z", "+00:00"))
    if found.tzinfo is None:
        raise ValueError("a time of no time zone")
    return found


def _fetched(pccs: str, quote: bytes) -> dcap_qvl.QuoteCollateralV3:
    """Ask a service, in a thread of its own: the caller may run an event loop."""

    async def fetch() -> dcap_qvl.QuoteCollateralV3:
        return await asyncio.wait_for(dcap_qvl.get_collateral(pccs, quote), _PCCS_TIMEOUT_S)

    with ThreadPoolExecutor(1) as thread:
        try:
            return thread.submit(asyncio.run, fetch()).result()
        except asyncio.TimeoutError:
            raise TransportError(f"{pccs} gave no collateral within {_PCCS_TIMEOUT_S:g} s.") from None
        except ValueError as error:
            raise TransportError(f"{pccs} gave no collateral: {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """Return what ``dcap-qvl`` says, in one line; the cause comes on the lines after the first."""
    return printable(" ".join(str(error).split())).rstrip(".")
