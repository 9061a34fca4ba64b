"""What a report binds: no two different keys, nonces or claims give the same 64 bytes."""

from __future__ import annotations

import base64
import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsqp.attest.claims import Claims, decode_claims, report_data
from tsqp.attest.evidence import MAX_EVIDENCE_BYTES, Evidence, decode_evidence
from tsqp.errors import EvidenceError, InternalError

KEY, NONCE = b"a public key", bytes(range(32))
CLAIMS = Claims(version="3", level="masked", masks="dealers", workers=("",), dealers=("k1", "k2"), model_digest="ab")
TEXT = b'{"dealers":["k1","k2"],"level":"masked","masks":"dealers","model_digest":"ab","version":"3","workers":[""]}'


def test_the_formula_is_the_documented_one() -> None:
    parts = [hashlib.sha256(KEY).digest(), NONCE, TEXT]
    text = b"tsqp attestation 1" + b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    assert report_data(KEY, NONCE, TEXT) == hashlib.sha512(text).digest()


def test_claims_travel_in_one_form() -> None:
    assert CLAIMS.encode() == TEXT
    assert decode_claims(TEXT) == CLAIMS


@given(
    first=st.tuples(st.binary(max_size=40), st.binary(min_size=32, max_size=32), st.binary(max_size=40)),
    second=st.tuples(st.binary(max_size=40), st.binary(min_size=32, max_size=32), st.binary(max_size=40)),
)
def test_different_inputs_are_different_bytes(first: tuple[bytes, ...], second: tuple[bytes, ...]) -> None:
    assert (report_data(*first) == report_data(*second)) is (first == second)


def test_a_byte_that_moves_from_one_part_to_the_next_shows() -> None:
    assert report_data(b"", NONCE, b"x" + TEXT) != report_data(b"", NONCE, TEXT)
    with pytest.raises(InternalError, match="a nonce of 33 bytes; expected 32"):
        report_data(b"", NONCE + b"x", TEXT)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        TEXT[:-1],
        TEXT.replace(b'"version":"3"', b'"version":3'),
        TEXT.replace(b'"masks"', b'"mask"'),
        TEXT[:-1] + b',"more":1}',
        b'{"version":"' + b"x" * (64 << 10) + b'"}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_claims_is_refused(raw: bytes) -> None:
    with pytest.raises(EvidenceError, match="claims"):
        decode_claims(raw)


@given(st.sampled_from(["sgx", "tdx", "none"]), st.binary(max_size=200), st.binary(max_size=200))
def test_evidence_survives_the_wire(tee: str, quote: bytes, claims: bytes) -> None:
    sent = Evidence.of(tee, quote, claims)  # type: ignore[arg-type]  # one of three
    came = decode_evidence(msgspec.json.encode(sent))
    assert came == sent
    assert (came.quote_bytes(), came.claims_bytes()) == (quote, claims)


@given(st.binary(max_size=300))
def test_any_bytes_are_evidence_or_an_error(raw: bytes) -> None:
    try:
        evidence = decode_evidence(raw)
    except EvidenceError:
        return
    assert isinstance(evidence, Evidence)  # Hypothesis also tries bytes that it finds in our sources


def test_what_is_no_base64_is_refused() -> None:
    evidence = Evidence(tee="sgx", quote="!", claims=base64.b64encode(b"x").decode() + "=")
    with pytest.raises(EvidenceError, match="the quote in the server's evidence is not base64"):
        evidence.quote_bytes()
    with pytest.raises(EvidenceError, match="the claims in the server's evidence is not base64"):
        evidence.claims_bytes()
    with pytest.raises(EvidenceError, match="at most"):
        decode_evidence(b" " * (MAX_EVIDENCE_BYTES + 1))
