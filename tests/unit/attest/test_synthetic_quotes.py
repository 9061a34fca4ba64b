"""Synthetic quotes are accepted under their own root, and refused where a real one of SGX or TDX would be."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import dcap_qvl
import pytest
from synthetic_quotes import ADVISORY, VALID_FROM, Authority, Tee

TEES: tuple[Tee, ...] = ("sgx", "tdx")
NOW = int(dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc).timestamp())
REPORT_DATA = bytes(range(64))
RTMRS = (b"\x40" * 48, b"\x41" * 48, b"\x42" * 48, b"\x43" * 48)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def quote_of(authority: Authority, tee: Tee, *, debug: bool = False) -> bytes:
    if tee == "tdx":
        return tdx_quote(authority, debug=debug)
    return authority.sgx_quote(
        mrenclave=b"\x11" * 32,
        mrsigner=b"\x22" * 32,
        isv_prod_id=0x0102,
        isv_svn=0x0304,
        report_data=REPORT_DATA,
        debug=debug,
    )


def tdx_quote(authority: Authority, *, debug: bool = False, **others: bytes) -> bytes:
    return authority.tdx_quote(mrtd=b"\x33" * 48, rtmrs=RTMRS, report_data=REPORT_DATA, debug=debug, **others)


def verified(
    raw: bytes, collateral: dcap_qvl.QuoteCollateralV3, authority: Authority, now: int = NOW
) -> dcap_qvl.VerifiedReport:
    return dcap_qvl.verify_with_root_ca(raw, collateral, authority.root_der, now)


def shown(report: dcap_qvl.VerifiedReport) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(report.to_json())["report"]
    return value


def test_an_enclaves_measurements_are_shown(authority: Authority) -> None:
    accepted = verified(quote_of(authority, "sgx"), authority.collateral("sgx"), authority)
    report = shown(accepted)["SgxEnclave"]
    assert accepted.status == "UpToDate"
    assert accepted.advisory_ids == []
    assert report["mr_enclave"] == "11" * 32
    assert report["mr_signer"] == "22" * 32
    assert (report["isv_prod_id"], report["isv_svn"]) == (0x0102, 0x0304)
    assert report["report_data"] == REPORT_DATA.hex()


def test_a_guests_measurements_are_shown(authority: Authority) -> None:
    accepted = verified(quote_of(authority, "tdx"), authority.collateral("tdx"), authority)
    report = shown(accepted)["TD10"]
    assert accepted.status == "UpToDate"
    assert accepted.advisory_ids == []
    assert report["mr_td"] == "33" * 48
    assert tuple(report[f"rt_mr{at}"] for at in range(4)) == tuple(rtmr.hex() for rtmr in RTMRS)
    assert report["report_data"] == REPORT_DATA.hex()


def test_further_fields_of_a_guests_report_are_as_asked(authority: Authority) -> None:
    raw = tdx_quote(authority, mr_seam=b"\x51" * 48, mr_config_id=b"\x52" * 48)
    report = shown(verified(raw, authority.collateral("tdx"), authority))["TD10"]
    assert (report["mr_seam"], report["mr_config_id"]) == ("51" * 48, "52" * 48)


@pytest.mark.parametrize("tee", TEES)
def test_a_quote_says_which_platform_it_is_of(tee: Tee) -> None:
    quote = dcap_qvl.parse_quote(quote_of(Authority(b"\x00\x90\x6e\xd5\x00\x00"), tee))
    assert quote.quote_type() == tee.upper()
    assert quote.fmspc() == "00906ED50000"
    assert quote.ca() == "processor"


@pytest.mark.parametrize("tee", TEES)
def test_collateral_survives_a_file(authority: Authority, tee: Tee) -> None:
    again = dcap_qvl.QuoteCollateralV3.from_json(authority.collateral(tee).to_json())
    assert verified(quote_of(authority, tee), again, authority).status == "UpToDate"


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize(
    "status",
    [
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
    ],
)
def test_a_platforms_status_is_reported(authority: Authority, tee: Tee, status: str) -> None:
    accepted = verified(quote_of(authority, tee), authority.collateral(tee, status=status), authority)
    assert accepted.status == status
    assert accepted.advisory_ids == [ADVISORY]


@pytest.mark.parametrize("tee", TEES)
def test_an_old_quoting_enclave_is_reported(authority: Authority, tee: Tee) -> None:
    accepted = verified(quote_of(authority, tee), authority.collateral(tee, qe_status="OutOfDate"), authority)
    assert accepted.status == "OutOfDate"


@pytest.mark.parametrize("tee", TEES)
@pytest.mark.parametrize(("status", "qe_status"), [("Revoked", "UpToDate"), ("UpToDate", "Revoked")])
def test_a_revoked_status_is_refused(authority: Authority, tee: Tee, status: str, qe_status: str) -> None:
    collateral = authority.collateral(tee, status=status, qe_status=qe_status)
    with pytest.raises(ValueError, match="Revoked"):
        verified(quote_of(authority, tee), collateral, authority)


@pytest.mark.parametrize("tee", TEES)
def test_debug_is_refused(authority: Authority, tee: Tee) -> None:
    with pytest.raises(ValueError, match="Debug mode is enabled"):
        verified(quote_of(authority, tee, debug=True), authority.collateral(tee), authority)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("td_attributes", bytes(8), "SEPT_VE_DISABLE is not enabled"),
        ("mr_signer_seam", b"\x01" * 48, "TDX module MRSIGNER mismatch"),
        ("tee_tcb_svn", b"\x00" + b"\x01" * 15, "TDX module ISVSVN 0 is below minimum"),
        ("tee_tcb_svn", b"\x01" * 15 + b"\x00", "No matching TCB level"),
    ],
)
def test_a_guest_with_a_bad_module_is_refused(authority: Authority, field: str, value: bytes, reason: str) -> None:
    raw = tdx_quote(authority, debug=False, **{field: value})
    with pytest.raises(ValueError, match=reason):
        verified(raw, authority.collateral("tdx"), authority)


@pytest.mark.parametrize("tee", TEES)
def test_a_revoked_platform_is_refused(authority: Authority, tee: Tee) -> None:
    with pytest.raises(ValueError, match="CertRevoked"):
        verified(quote_of(authority, tee), authority.collateral(tee, revoked=True), authority)


@pytest.mark.parametrize("tee", TEES)
def test_another_root_is_refused(authority: Authority, tee: Tee) -> None:
    raw, other = quote_of(authority, tee), Authority()
    with pytest.raises(ValueError, match="InvalidSignatureForPublicKey"):
        verified(raw, other.collateral(tee), other)
    with pytest.raises(ValueError, match="root CA CRL"):
        verified(raw, authority.collateral(tee), other)
    with pytest.raises(ValueError, match="root CA CRL"):
        dcap_qvl.verify(raw, authority.collateral(tee), NOW)


@pytest.mark.parametrize("tee", TEES)
def test_collateral_is_valid_until_its_end(authority: Authority, tee: Tee) -> None:
    raw, ends = quote_of(authority, tee), dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc)
    collateral, last = authority.collateral(tee, not_after=ends), int(ends.timestamp())
    assert verified(raw, collateral, authority, last - 1).status == "UpToDate"
    with pytest.raises(ValueError, match="CrlExpired"):
        verified(raw, collateral, authority, last + 1)


@pytest.mark.parametrize("tee", TEES)
def test_collateral_is_not_valid_before_its_start(authority: Authority, tee: Tee) -> None:
    raw, collateral, first = quote_of(authority, tee), authority.collateral(tee), int(VALID_FROM.timestamp())
    assert verified(raw, collateral, authority, first).status == "UpToDate"
    with pytest.raises(ValueError, match="issue date is in the future"):
        verified(raw, collateral, authority, first - 1)


def test_collateral_of_the_other_kind_is_refused(authority: Authority) -> None:
    for tee, other in (TEES, TEES[::-1]):
        with pytest.raises(ValueError, match="Unsupported QE Identity"):
            verified(quote_of(authority, tee), authority.collateral(other), authority)


@pytest.mark.parametrize("tee", TEES)
def test_every_byte_that_is_signed_matters(authority: Authority, tee: Tee) -> None:
    raw, collateral = quote_of(authority, tee), authority.collateral(tee)
    # Header and report; their length follows the quote's first part, then its signature and the attestation key.
    report_end = 48 + (384 if tee == "sgx" else 584)
    key_end = report_end + 4 + 64 + 64
    # The quoting enclave's report, its signature, and authentication data after its length.
    qe_start = key_end + (0 if tee == "sgx" else 6)
    qe_end = qe_start + 384 + 64 + 2 + 32
    for at in (*range(report_end), *range(report_end + 4, key_end), *range(qe_start, qe_end)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ValueError, match="Verification failed"):
            verified(bytes(flipped), collateral, authority)


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_collateral_that_was_edited_is_refused(authority: Authority, name: str) -> None:
    edited = json.loads(authority.collateral("sgx", status="OutOfDate", qe_status="OutOfDate").to_json())
    edited[name] = edited[name].replace("OutOfDate", "UpToDate")
    collateral = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(edited))
    with pytest.raises(ValueError, match=f"Signature is invalid for {name}"):
        verified(quote_of(authority, "sgx"), collateral, authority)


def test_a_field_of_another_length_is_an_error(authority: Authority) -> None:
    with pytest.raises(ValueError, match="mr_td has 47 bytes"):
        authority.tdx_quote(mrtd=bytes(47), rtmrs=RTMRS, report_data=REPORT_DATA)
    with pytest.raises(ValueError, match="mrenclave has 31 bytes"):
        authority.sgx_quote(mrenclave=bytes(31), mrsigner=bytes(32), isv_prod_id=0, isv_svn=0, report_data=bytes(64))
