"""What evidence must be to pass, and that each way in which it is not has an error of its own."""

from __future__ import annotations

import datetime as dt
import random
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import dcap_qvl
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_quotes import VALID_FROM, Authority

from tsqp.attest.claims import Claims, report_data
from tsqp.attest.collateral import read_collateral, read_root
from tsqp.attest.evidence import Evidence
from tsqp.attest.policy import Policy, SgxPolicy, TdxPolicy
from tsqp.attest.verifier import Attested, verify
from tsqp.errors import (
    AttestationError,
    ClaimsError,
    CollateralError,
    DebugEnclaveError,
    EvidenceError,
    MeasurementError,
    NoTeeError,
    QuoteError,
    ReportDataError,
    TcbStatusError,
    TransportError,
)

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.timezone.utc)
KEY, NONCE = b"the TLS key, DER", bytes(range(32))
CLAIMS = Claims(
    version="3.0", level="masked", masks="dealers", workers=("",), dealers=("d1", "d2"), model_digest="ab" * 32
)
ENCLAVE, SIGNER = b"\x11" * 32, b"\x22" * 32
FIRMWARE, RTMRS = b"\x33" * 48, (b"\x40" * 48, b"\x41" * 48, b"\x42" * 48, b"\x43" * 48)
AUTHORITY, STRANGER = Authority(), Authority()
SGX, TDX = "sgx", "tdx"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """For each TEE: exactly this code, on an up-to-date platform of this authority."""
    directory = tmp_path_factory.mktemp("policies")
    (directory / "root.der").write_bytes(AUTHORITY.root_der)
    made = {}
    for tee in (SGX, TDX):
        store(directory / tee, AUTHORITY.collateral(tee))  # type: ignore[arg-type]  # one of two
        made[tee] = Policy(
            sgx=SgxPolicy(mrenclave=(ENCLAVE.hex(),)) if tee == SGX else None,
            tdx=TdxPolicy(mrtd=(FIRMWARE.hex(),), rtmrs={f"rtmr{at}": (value.hex(),) for at, value in enumerate(RTMRS)})
            if tee == TDX
            else None,
            collateral_file=directory / tee,
            root_ca=directory / "root.der",
        )
    return made


def store(file: Path, collateral: dcap_qvl.QuoteCollateralV3) -> Path:
    file.write_text(collateral.to_json(), encoding="utf-8")
    return file


def data(claims: bytes = CLAIMS.encode(), key: bytes = KEY, nonce: bytes = NONCE) -> bytes:
    return report_data(key, nonce, claims)


def quote(tee: str, by: Authority = AUTHORITY, **changed: Any) -> bytes:
    if tee == SGX:
        named = {"mrenclave": ENCLAVE, "mrsigner": SIGNER, "isv_prod_id": 7, "isv_svn": 3, "report_data": data()}
        return by.sgx_quote(**{**named, **changed})
    return by.tdx_quote(**{"mrtd": FIRMWARE, "rtmrs": RTMRS, "report_data": data(), **changed})


def checked(policy: Policy, tee: str, raw: bytes, claims: bytes = CLAIMS.encode(), **asked: Any) -> Attested:
    evidence = Evidence.of(tee, raw, claims)  # type: ignore[arg-type]  # one of three
    return verify(evidence, policy, **{"nonce": NONCE, "public_key": KEY, "now": lambda: NOW, **asked})


def with_collateral(policy: Policy, directory: Path, tee: str, **state: Any) -> Policy:
    made = AUTHORITY.collateral(tee, **state)  # type: ignore[arg-type]  # one of two
    return replace(policy, collateral_file=store(directory / "collateral.json", made))


both = pytest.mark.parametrize("tee", [SGX, TDX])


@both
def test_what_is_as_the_policy_wants_it_passes(tee: str, policies: dict[str, Policy]) -> None:
    found = checked(policies[tee], tee, quote(tee))
    assert (found.tee, found.status, found.advisories, found.claims) == (tee, "UpToDate", (), CLAIMS)
    if tee == SGX:
        assert found.measurements == {
            "mr_enclave": ENCLAVE.hex(), "mr_signer": SIGNER.hex(), "isv_prod_id": "7", "isv_svn": "3",
        }  # fmt: skip
    else:
        names = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3")
        assert found.measurements == dict(zip(names, [value.hex() for value in (FIRMWARE, *RTMRS)], strict=True))


def test_a_signers_later_versions_pass(policies: dict[str, Policy]) -> None:
    policy = replace(policies[SGX], sgx=SgxPolicy(mrsigner=SIGNER.hex(), isv_prod_id=7, min_isv_svn=3))
    for enclave, svn in ((ENCLAVE, 3), (b"\x99" * 32, 4), (b"\x98" * 32, 65535)):
        assert checked(policy, SGX, quote(SGX, mrenclave=enclave, isv_svn=svn)).tee == SGX
    for changed, message in (
        ({"mrsigner": b"\x23" * 32}, "somebody else signed it: MRSIGNER is 2323"),
        ({"isv_prod_id": 8}, "another product of this signer runs there: ISVPRODID is 8; the policy wants 7"),
        ({"isv_svn": 2}, "an old version runs there: ISVSVN is 2; the policy wants at least 3"),
    ):
        with pytest.raises(MeasurementError, match=message):
            checked(policy, SGX, quote(SGX, **changed))


@pytest.mark.parametrize(
    ("tee", "changed", "message"),
    [
        (SGX, {"mrenclave": b"\x12" * 32}, "MRENCLAVE is 1212"),
        (TDX, {"mrtd": b"\x12" * 48}, "MRTD is 1212"),
        *((TDX, {"rtmrs": (*RTMRS[:at], b"\x12" * 48, *RTMRS[at + 1 :])}, f"RTMR{at} is 1212") for at in range(4)),
    ],
)
def test_other_code_is_refused(tee: str, changed: dict[str, Any], message: str, policies: dict[str, Policy]) -> None:
    with pytest.raises(MeasurementError, match=f"other code runs there: {message}"):
        checked(policies[tee], tee, quote(tee, **changed))


def test_registers_that_are_not_pinned_may_be_anything(policies: dict[str, Policy]) -> None:
    tdx = TdxPolicy(mrtd=(FIRMWARE.hex(),), rtmrs={"rtmr1": (RTMRS[1].hex(),), "rtmr2": (RTMRS[2].hex(),)})
    changed = (b"\x12" * 48, RTMRS[1], RTMRS[2], b"\x13" * 48)
    assert checked(replace(policies[TDX], tdx=tdx), TDX, quote(TDX, rtmrs=changed)).tee == TDX


@both
def test_memory_that_a_debugger_reads_is_refused(tee: str, policies: dict[str, Policy]) -> None:
    with pytest.raises(DebugEnclaveError, match="debug mode: its host can read all of its memory"):
        checked(policies[tee], tee, quote(tee, debug=True))


def test_no_attribute_of_a_guest_may_say_that_it_is_not_trusted(policies: dict[str, Policy]) -> None:
    for bit in range(8):
        attributes = bytes([1 << bit, 0, 0, 0x10, 0, 0, 0, 0])
        with pytest.raises(DebugEnclaveError):
            checked(policies[TDX], TDX, quote(TDX, td_attributes=attributes))


@both
@pytest.mark.parametrize("part", ["key", "nonce", "claims", "quote"])
def test_a_quote_of_another_connection_question_or_claim_is_refused(
    tee: str, part: str, policies: dict[str, Policy]
) -> None:
    """Each alone: a man in the middle with a key of his own, an old quote, claims of his own, any other report."""
    changed: dict[str, Any] = {
        "key": {"public_key": b"another key"},
        "nonce": {"nonce": bytes(32)},
        "claims": {"claims": replace_claims(level="open")},
        "quote": {},
    }[part]
    raw = quote(tee, report_data=bytes(64)) if part == "quote" else quote(tee)
    with pytest.raises(ReportDataError, match="does not belong to this connection"):
        checked(policies[tee], tee, raw, **changed)


def replace_claims(**changed: Any) -> bytes:
    return msgspec.structs.replace(CLAIMS, **changed).encode()


@pytest.mark.parametrize(
    ("pinned", "message"),
    [
        ({"level": ("verified", "open")}, "level is 'masked'; the policy wants 'verified' or 'open'"),
        ({"masks": ("enclave",)}, "masks is 'dealers'"),
        ({"model_digest": ("cd" * 32,)}, "model_digest is 'abab"),
        ({"version": ("4",)}, "version is '3.0'"),
        ({"workers": (("w",),)}, r"workers is \[''\]; the policy wants \['w'\]"),
        ({"dealers": (("d1",),)}, r"dealers is \['d1', 'd2'\]; the policy wants \['d1'\]"),
        ({"dealers": (("d2", "d1"),)}, "dealers is"),
        ({"level": ("masked",), "dealers": ((),)}, r"the policy wants \[\]"),
    ],
)
def test_each_claim_can_be_pinned(
    pinned: dict[str, tuple[object, ...]], message: str, policies: dict[str, Policy]
) -> None:
    with pytest.raises(ClaimsError, match=message):
        checked(replace(policies[SGX], claims=pinned), SGX, quote(SGX))


def test_pinned_claims_that_are_right_pass(policies: dict[str, Policy]) -> None:
    pinned: dict[str, tuple[object, ...]] = {
        "level": ("verified", "masked"), "dealers": (("d1", "d2"),), "workers": (("",),), "version": ("3.0",),
    }  # fmt: skip
    assert checked(replace(policies[SGX], claims=pinned), SGX, quote(SGX)).claims == CLAIMS


def test_claims_that_are_none_are_refused_though_the_quote_is_of_them(policies: dict[str, Policy]) -> None:
    raw = quote(SGX, report_data=data(b"{}"))
    with pytest.raises(EvidenceError, match="claims are not those of a TSQP server"):
        checked(policies[SGX], SGX, raw, b"{}")


@both
def test_a_status_must_be_allowed(tee: str, policies: dict[str, Policy], tmp_path: Path) -> None:
    for status in ("SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"):
        policy = with_collateral(policies[tee], tmp_path, tee, status=status)
        with pytest.raises(TcbStatusError, match=f"processor is {status} .INTEL-SA-00000.; the policy allows UpToDate"):
            checked(policy, tee, quote(tee))
        found = checked(replace(policy, statuses=("UpToDate", status)), tee, quote(tee))
        assert (found.status, found.advisories) == (status, ("INTEL-SA-00000",))


@both
def test_a_status_of_the_quoting_enclave_counts_where_the_other_hides_it(
    tee: str, policies: dict[str, Policy], tmp_path: Path
) -> None:
    policy = with_collateral(policies[tee], tmp_path, tee, qe_status="ConfigurationNeeded")
    with pytest.raises(TcbStatusError, match="quoting enclave is ConfigurationNeeded"):
        checked(policy, tee, quote(tee))


@both
@pytest.mark.parametrize("state", [{"revoked": True}, {"status": "Revoked"}, {"qe_status": "Revoked"}], ids=str)
def test_what_is_revoked_is_refused_whatever_a_policy_allows(
    tee: str, state: dict[str, Any], policies: dict[str, Policy], tmp_path: Path
) -> None:
    policy = with_collateral(policies[tee], tmp_path, tee, **state)
    with pytest.raises(QuoteError, match=r"not genuine: .*(?i:revoked)"):
        checked(replace(policy, statuses=("UpToDate", "OutOfDate", "Revoked")), tee, quote(tee))


@both
def test_a_quote_that_others_vouch_for_is_refused(tee: str, policies: dict[str, Policy]) -> None:
    with pytest.raises(QuoteError, match="not genuine"):
        checked(policies[tee], tee, quote(tee, STRANGER))
    with pytest.raises(QuoteError, match="not genuine"):  # nobody but Intel, unless a policy says so
        checked(replace(policies[tee], root_ca=None), tee, quote(tee))


@both
def test_a_quote_of_another_kind_is_refused(tee: str, policies: dict[str, Policy]) -> None:
    other = TDX if tee == SGX else SGX
    with pytest.raises(NoTeeError, match=f"runs in {other.upper()}, of which the policy pins no measurement"):
        checked(policies[tee], other, quote(other))
    with pytest.raises(QuoteError, match=f"says that its quote is of {tee}; it is of {other}"):
        checked(policies[tee], tee, quote(other))
    with pytest.raises(NoTeeError, match="attestation is 'none', for development, and proves nothing"):
        checked(policies[tee], "none", b"")


@both
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_any_flipped_bit_of_what_is_signed_is_refused(tee: str, seed: int, policies: dict[str, Policy]) -> None:
    """Up to the signature of the quote and its key; what follows are certificates, with encodings of their own."""
    raw = bytearray(quote(tee))
    at = random.Random(seed).randrange(8 * ((48 + (384 if tee == SGX else 584)) + 4 + 64 + 64))
    raw[at // 8] ^= 1 << at % 8
    with pytest.raises(AttestationError):
        checked(policies[tee], tee, bytes(raw))


@both
@settings(max_examples=100, deadline=None)
@given(kept=st.integers(0, 3200))
def test_a_quote_that_is_cut_is_refused(tee: str, kept: int, policies: dict[str, Policy]) -> None:
    raw = quote(tee)
    with pytest.raises(AttestationError):
        checked(policies[tee], tee, raw[: min(kept, len(raw) - 1)])


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=600))
def test_any_bytes_are_refused(raw: bytes, policies: dict[str, Policy]) -> None:
    with pytest.raises(QuoteError, match="malformed"):
        checked(policies[SGX], SGX, raw)


@both
def test_collateral_that_has_expired_says_so(tee: str, policies: dict[str, Policy], tmp_path: Path) -> None:
    policy = with_collateral(policies[tee], tmp_path, tee, not_after=NOW - dt.timedelta(days=1))
    with pytest.raises(CollateralError, match=r"the collateral's TCB info expired on 2026-05-31: fetch it anew"):
        checked(policy, tee, quote(tee))
    with pytest.raises(QuoteError, match="in the future"):
        checked(policies[tee], tee, quote(tee), now=lambda: VALID_FROM - dt.timedelta(days=1))


def test_files_that_are_no_collateral_or_root_are_refused(policies: dict[str, Policy], tmp_path: Path) -> None:
    file = tmp_path / "file"
    for text, message in (("", "is no collateral"), ("{}", "is no collateral"), (" " * (5 << 20), "more than")):
        file.write_text(text)
        with pytest.raises(CollateralError, match=message):
            read_collateral(file)
    with pytest.raises(CollateralError, match="cannot read the collateral"):
        read_collateral(tmp_path / "none")
    with pytest.raises(CollateralError, match="is no certificate, neither PEM nor DER"):
        read_root(file)
    with pytest.raises(CollateralError, match="cannot read the root certificate"):
        checked(replace(policies[SGX], root_ca=tmp_path / "none"), SGX, quote(SGX))


def test_a_root_may_be_pem(tmp_path: Path) -> None:
    (tmp_path / "root.pem").write_text(ssl.DER_cert_to_PEM_cert(AUTHORITY.root_der))
    assert read_root(tmp_path / "root.pem") == AUTHORITY.root_der


def test_a_service_gives_collateral_or_an_error(policies: dict[str, Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def given_by(pccs: str, raw: bytes) -> dcap_qvl.QuoteCollateralV3:
        asked.append(f"{pccs} for {dcap_qvl.parse_quote(raw).fmspc()}")
        return AUTHORITY.collateral()

    policy = replace(policies[SGX], collateral_file=None, pccs="https://pccs.example")
    monkeypatch.setattr(dcap_qvl, "get_collateral", given_by)
    assert checked(policy, SGX, quote(SGX)).tee == SGX
    assert asked == [f"https://pccs.example for {AUTHORITY.fmspc.hex().upper()}"]
    monkeypatch.undo()
    with pytest.raises(TransportError, match=r"https://127\.0\.0\.1:9 gave no collateral"):
        checked(replace(policy, pccs="https://127.0.0.1:9"), SGX, quote(SGX))
