"""Attestation, as a client reads it: evidence, quotes, claims, collateral, root certificates, and its own policy."""

from __future__ import annotations

import contextlib
import datetime as dt
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fuzz import models
from fuzz.files import changed_json
from fuzz.targets import CORPUS
from tsqp.attest.claims import Claims, decode_claims, report_data
from tsqp.attest.collateral import check_valid, read_collateral, read_root
from tsqp.attest.evidence import Evidence, decode_evidence
from tsqp.attest.policy import Policy, read_policy
from tsqp.attest.verifier import verify
from tsqp.errors import AttestationError, SetupError

_KINDS = ("evidence", "sgx", "tdx", "claims", "collateral", "root", "policy")
_NOW = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
_NONCE, _KEY = bytes(32), b"key"
_CLAIMS = Claims(version="3", level="masked", masks="enclave", workers=("",), dealers=(), model_digest="d" * 64)
_POLICY = """[sgx]
mrenclave = "{zeros}"
[tdx]
mrtd = "{mrtd}"
rtmr1 = "{mrtd}"
rtmr2 = "{mrtd}"
[tcb]
allowed = ["UpToDate"]
[claims]
level = "masked"
[collateral]
file = "collateral"
root_ca = "root"
"""
_JSON = ("evidence", "claims", "collateral")


def run(data: bytes) -> None:
    """Read the input as the kind that its first byte names, everything else being genuine."""
    kind, raw = _KINDS[data[0] % len(_KINDS) if data else 0], data[1:]
    with contextlib.suppress(AttestationError, SetupError):
        _READERS[kind](raw)


def _evidence(raw: bytes) -> None:
    _verify(decode_evidence(raw))


def _quote(tee: str) -> Callable[[bytes], None]:
    return lambda raw: _verify(Evidence.of(tee, raw, _CLAIMS.encode()))  # type: ignore[arg-type]  # one of three


def _collateral(raw: bytes) -> None:
    path = _written("collateral", raw)
    check_valid(read_collateral(path), _NOW)
    quote = (CORPUS / "quotes" / "sgx").read_bytes()[1:]
    _verify(Evidence.of("sgx", quote, _CLAIMS.encode()), collateral=path)


def _verify(evidence: Evidence, collateral: Path | None = None) -> None:
    verify(evidence, _policy(collateral), nonce=_NONCE, public_key=_KEY, now=lambda: _NOW)


def _policy(collateral: Path | None) -> Policy:
    from dataclasses import replace  # noqa: PLC0415

    policy = _genuine()
    return replace(policy, collateral_file=collateral) if collateral else policy


@cache
def _genuine() -> Policy:
    for name in ("collateral", "root", "policy"):
        raw = (CORPUS / "quotes" / name).read_bytes()[1:]
        (models.scratch() / f"genuine-{name}").write_bytes(raw)
    policy = (models.scratch() / "genuine-policy").read_text(encoding="utf-8")
    path = _written(
        "policy", policy.replace('"collateral"', '"genuine-collateral"').replace('"root"', '"genuine-root"').encode()
    )
    return read_policy(path)


def _written(name: str, raw: bytes) -> Path:
    path = models.scratch() / f"fuzzed-{name}"
    path.write_bytes(raw)
    return path


_READERS: dict[str, Callable[[bytes], object]] = {
    "evidence": _evidence,
    "sgx": _quote("sgx"),
    "tdx": _quote("tdx"),
    "claims": decode_claims,
    "collateral": _collateral,
    "root": lambda raw: read_root(_written("root", raw)),
    "policy": lambda raw: read_policy(_written("policy", raw)),
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change one place of what is JSON; of collateral also of the JSON inside."""
    kind = _KINDS[data[0] % len(_KINDS) if data else 0]
    if kind in _JSON:
        return data[:1] + changed_json(data[1:], rng)
    raw = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        raw[rng.randrange(1, max(2, len(raw))) :][:1] = bytes([rng.randrange(256)])
    at = rng.randrange(1, max(2, len(raw)))
    raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(raw)


def seeds() -> dict[str, bytes]:
    """Return quotes of keys that are thrown away, and what they are verified with."""
    from synthetic_quotes import Authority  # noqa: PLC0415

    authority = Authority()
    told = report_data(_KEY, _NONCE, _CLAIMS.encode())
    sgx = authority.sgx_quote(mrenclave=bytes(32), mrsigner=bytes(32), isv_prod_id=7, isv_svn=3, report_data=told)
    parts = {
        "evidence": b'{"tee": "sgx", "quote": "%s", "claims": "%s"}'
        % (Evidence.of("sgx", sgx, b"").quote.encode(), Evidence.of("sgx", b"", _CLAIMS.encode()).claims.encode()),
        "sgx": sgx,
        "tdx": authority.tdx_quote(mrtd=bytes(48), rtmrs=(bytes(48),) * 4, report_data=told),
        "claims": _CLAIMS.encode(),
        "collateral": authority.collateral("sgx").to_json().encode(),
        "root": authority.root_der,
        "policy": _POLICY.format(zeros="00" * 32, mrtd="00" * 48).encode(),
    }
    return {kind: bytes([_KINDS.index(kind)]) + raw for kind, raw in parts.items()}
