"""Decides whether evidence is good enough for a policy. Everything here raises; nothing returns a verdict to forget.

The quote's signature, its certificates, revocation and TCB status are the work of ``dcap-qvl``; measurements, the debug
flag, report data and claims are compared here. docs/attestation.md says what each protects from.
"""

from __future__ import annotations

import datetime as dt
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dcap_qvl

from tsqp.attest.claims import Claims, decode_claims, report_data
from tsqp.attest.collateral import check_valid, collateral_for, read_root, reason_of
from tsqp.attest.evidence import Evidence, Provable
from tsqp.attest.policy import Policy, SgxPolicy, TdxPolicy
from tsqp.errors import (
    ClaimsError,
    DebugEnclaveError,
    MeasurementError,
    NoTeeError,
    QuoteError,
    ReportDataError,
    TcbStatusError,
    printable,
)

# Of an SGX enclave's attributes, and of a TDX guest's; the guest's are a group of which none may be set.
_SGX_DEBUG = 0x02
_TDX_DEBUG = 0xFF
_MEASUREMENTS: Mapping[Provable, tuple[str, ...]] = {
    "sgx": ("mr_enclave", "mr_signer", "isv_prod_id", "isv_svn"),
    "tdx": ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3"),
}


@dataclass(frozen=True, slots=True)
class Attested:
    """What was proved.

    Attributes:
        tee: which kind.
        measurements: by name, hexadecimal or decimal.
        status: of the platform's TCB.
        advisories: Intel's, that apply to it.
        claims: that the enclave stands by.
    """

    tee: Provable
    measurements: Mapping[str, str]
    status: str
    advisories: tuple[str, ...]
    claims: Claims


def verify(
    evidence: Evidence,
    policy: Policy,
    *,
    nonce: bytes,
    public_key: bytes,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.timezone.utc),
) -> Attested:
    """Check evidence against a policy.

    Args:
        evidence: from a server.
        policy: what is accepted.
        nonce: that the server was asked with, drawn for this once.
        public_key: of the TLS connection over which it came, DER SubjectPublicKeyInfo.
        now: the time, for certificates and collateral.

    Raises:
        AttestationError: something is not as the policy wants it; its class says what.
        CollateralError, TransportError: there is nothing to verify a quote with.
    """
    raw = evidence.quote_bytes()
    tee = _kind(evidence, raw, policy)
    verified = _verified(raw, policy, now())
    found = json.loads(verified.to_json())
    _check_status(found, policy.statuses)
    report = _report(found)
    if tee == "sgx":
        _check_sgx(report, policy.sgx)
    else:
        _check_tdx(report, policy.tdx)
    claimed = evidence.claims_bytes()
    expected = report_data(public_key, nonce, claimed)
    if not hmac.compare_digest(expected, bytes.fromhex(report["report_data"])):
        raise ReportDataError(
            "the quote does not belong to this connection: it is of another TLS key, of another nonce (an old quote), "
            "or of other claims."
        )
    claims = decode_claims(claimed)
    _check_claims(claims, policy.claims)
    measurements = {name: str(report[name]) for name in _MEASUREMENTS[tee]}
    return Attested(tee, measurements, verified.status, tuple(verified.advisory_ids), claims)


def _kind(evidence: Evidence, raw: bytes, policy: Policy) -> Provable:
    """Return of what kind a quote is; refuse what the policy does not accept, and memory that a debugger reads."""
    if evidence.tee == "none":
        raise NoTeeError(
            "the server runs in no trusted execution environment: its attestation is 'none', for development, and "
            "proves nothing."
        )
    if (policy.sgx if evidence.tee == "sgx" else policy.tdx) is None:
        raise NoTeeError(f"the server runs in {evidence.tee.upper()}, of which the policy pins no measurement.")
    try:
        quote = dcap_qvl.parse_quote(raw)
        if quote.is_tdx():
            kind, debug = "tdx", quote.report.td_attributes[0] & _TDX_DEBUG
        else:
            kind, debug = "sgx", quote.report.attributes[0] & _SGX_DEBUG
    except ValueError as error:
        raise QuoteError(f"the server's quote is malformed: {reason_of(error)}.") from error
    if kind != evidence.tee:
        raise QuoteError(f"the server says that its quote is of {evidence.tee}; it is of {kind}.")
    if debug:
        raise DebugEnclaveError("the server's enclave is in debug mode: its host can read all of its memory.")
    return evidence.tee


def _verified(raw: bytes, policy: Policy, now: dt.datetime) -> dcap_qvl.VerifiedReport:
    collateral = collateral_for(policy, raw)
    check_valid(collateral, now)
    seconds = int(now.timestamp())
    root = None if policy.root_ca is None else read_root(policy.root_ca)
    try:
        if root is None:
            return dcap_qvl.verify(raw, collateral, seconds)
        return dcap_qvl.verify_with_root_ca(raw, collateral, root, seconds)
    except ValueError as error:
        raise QuoteError(f"the server's quote is not genuine: {reason_of(error)}.") from error


def _check_status(found: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Check the platform's TCB and that of the enclave that signed: a status of both together may hide the latter's."""
    for name, part in (("processor", "platform_status"), ("quoting enclave", "qe_status")):
        status, advisories = found[part]["status"], found[part]["advisory_ids"]
        if status not in allowed:
            listed = f" ({', '.join(advisories)})" if advisories else ""
            raise TcbStatusError(
                f"the TCB status of the server's {name} is {status}{listed}; the policy allows {', '.join(allowed)}."
            )


def _report(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report's fields; later versions of a guest's have the first one's in ``base``."""
    (report,) = found["report"].values()
    return {**report.get("base", {}), **report}


def _check_sgx(report: Mapping[str, Any], policy: SgxPolicy | None) -> None:
    if policy is None:
        raise NoTeeError("the policy accepts no SGX enclave.")
    enclave, signer = report["mr_enclave"], report["mr_signer"]
    if policy.mrenclave:
        if enclave not in policy.mrenclave:
            raise MeasurementError(f"other code runs there: MRENCLAVE is {enclave}, which the policy does not list.")
        return
    if signer != policy.mrsigner:
        raise MeasurementError(f"somebody else signed it: MRSIGNER is {signer}; the policy wants {policy.mrsigner}.")
    if report["isv_prod_id"] != policy.isv_prod_id:
        raise MeasurementError(
            f"another product of this signer runs there: ISVPRODID is {report['isv_prod_id']}; the policy wants "
            f"{policy.isv_prod_id}."
        )
    if report["isv_svn"] < policy.min_isv_svn:
        raise MeasurementError(
            f"an old version runs there: ISVSVN is {report['isv_svn']}; the policy wants at least {policy.min_isv_svn}."
        )


def _check_tdx(report: Mapping[str, Any], policy: TdxPolicy | None) -> None:
    if policy is None:
        raise NoTeeError("the policy accepts no TDX guest.")
    wanted = {"mr_td": policy.mrtd, **{f"rt_mr{name[-1]}": values for name, values in policy.rtmrs.items()}}
    for name, values in wanted.items():
        if report[name] not in values:
            shown = name.replace("_", "").upper()
            raise MeasurementError(f"other code runs there: {shown} is {report[name]}, which the policy does not list.")


def _check_claims(claims: Claims, pinned: Mapping[str, tuple[object, ...]]) -> None:
    for name, values in pinned.items():
        found = getattr(claims, name)
        if found not in values:
            shown = " or ".join(_shown(value) for value in values)
            raise ClaimsError(f"the server's {name} is {_shown(found)}; the policy wants {shown}.")


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(each) for each in value)}]"
    return printable(repr(value))
