"""Quotes of SGX enclaves and TDX guests that no processor made, and the collateral to verify them with.

All that a verifier looks at is made here, with throw-away keys:

    root -- PCK CA -- PCK certificate -- QE report -- attestation key -- quote
    root -- TCB signing -- TCB info, QE identity

so a test can have a quote of any enclave, on a platform in any state. Who trusts ``root_der`` accepts it, nobody else.

References:
    Layouts are Intel's: of an SGX quote "SGX DCAP: ECDSA Quote Library API", A.4 "Quote Format"; of a TDX quote "TDX
    DCAP: Quote Generation Library and Quote Verification Library", A.3 "Version 4 Quote Format"; of what is special
    about a PCK certificate "SGX PCK Certificate and Certificate Revocation List Profile Specification", 1.3.5.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import struct
from typing import Any, Literal

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

Tee = Literal["sgx", "tdx"]

# Of certificates, and of collateral unless a test wants it to end earlier.
VALID_FROM = dt.datetime(2024, 1, 1, tzinfo=dt.timezone.utc)
VALID_UNTIL = dt.datetime(2049, 12, 31, tzinfo=dt.timezone.utc)
# What is said of every status but UpToDate.
ADVISORY = "INTEL-SA-00000"

_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")  # Intel
_QE_MRSIGNER = b"\xaa" * 32
_QE_PROD_ID = {"sgx": 1, "tdx": 2}
_QE_AUTH_DATA = bytes(range(32))
_TEE_TYPE = {"sgx": 0x00, "tdx": 0x81}
_QUOTE_VERSION = {"sgx": 3, "tdx": 4}
_P256_KEY = 2
_PCK_CHAIN, _QE_REPORT = 5, 6  # types of certification data
# Every component of the platform has this version, and the only TCB level asks for it.
_SVN = 1
_SVNS = bytes([_SVN] * 16)

# INIT and MODE64BIT; x87, SSE, AVX and AVX-512.
_ENCLAVE_ATTRIBUTES = struct.pack("<QQ", 0x05, 0xE7)
_ENCLAVE_DEBUG = 0x02
# SEPT_VE_DISABLE, without which the host can make a guest handle faults that it provokes.
_TD_ATTRIBUTES = 1 << 28
_TD_DEBUG = 0x01

# A TD report's fields, in order, by dcap-qvl's names. The first two bytes of tee_tcb_svn are the TDX module's security
# and major versions; the latter says which of the TCB info's identities is its own.
_TD_REPORT = {
    "tee_tcb_svn": _SVNS,
    "mr_seam": bytes(48),
    "mr_signer_seam": bytes(48),
    "seam_attributes": bytes(8),
    "td_attributes": struct.pack("<Q", _TD_ATTRIBUTES),
    "xfam": struct.pack("<Q", 0x0602E7),
    "mr_td": bytes(48),
    "mr_config_id": bytes(48),
    "mr_owner": bytes(48),
    "mr_owner_config": bytes(48),
    "rt_mr0": bytes(48),
    "rt_mr1": bytes(48),
    "rt_mr2": bytes(48),
    "rt_mr3": bytes(48),
    "report_data": bytes(64),
}

_SGX_OID = "1.2.840.113741.1.13.1"
_SGX_OID_DER = bytes.fromhex("2a864886f84d010d01")


class Authority:
    """A root certificate and one platform that it vouches for, with SGX and TDX.

    Args:
        fmspc: six bytes that name the platform's kind; collateral is for one kind.
    """

    def __init__(self, fmspc: bytes = b"TSQP\x00\x00") -> None:
        self.fmspc = fmspc
        self._root, self._pck_ca, self._pck, self._tcb_signing, self._attestation = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(5)
        )
        root, pck_ca = _name("Root CA"), _name("PCK Processor CA")
        self._root_certificate = _certificate(root, self._root, root, self._root, ca=True)
        self._pck_ca_certificate = _certificate(pck_ca, self._pck_ca, root, self._root, ca=True)
        platform = x509.UnrecognizedExtension(x509.ObjectIdentifier(_SGX_OID), _platform(fmspc))
        self._pck_certificate = _certificate(_name("PCK Certificate"), self._pck, pck_ca, self._pck_ca, platform)
        self._tcb_certificate = _certificate(_name("TCB Signing"), self._tcb_signing, root, self._root)

    @property
    def root_der(self) -> bytes:
        """The root certificate, DER: what a verifier must trust."""
        return self._root_certificate.public_bytes(Encoding.DER)

    def collateral(
        self,
        tee: Tee = "sgx",
        *,
        status: str = "UpToDate",
        qe_status: str = "UpToDate",
        not_after: dt.datetime = VALID_UNTIL,
        revoked: bool = False,
    ) -> dcap_qvl.QuoteCollateralV3:
        """Make what Intel publishes of the platform.

        Args:
            tee: whose quotes it is for.
            status: of the platform's TCB, in Intel's words: "OutOfDate", "SWHardeningNeeded" and so on.
            qe_status: of the quoting enclave: "UpToDate", "OutOfDate" or "Revoked". The worse of both is reported.
            not_after: until when it is valid, all of it.
            revoked: whether the platform's certificate is.
        """
        validity = {"issueDate": _iso(VALID_FROM), "nextUpdate": _iso(not_after), "tcbEvaluationDataNumber": 1}
        tcb_info = json.dumps({**_tcb_info(tee, self.fmspc, status), **validity})
        qe_identity = json.dumps({**_qe_identity(tee, qe_status), **validity})
        serials = [self._pck_certificate.serial_number] if revoked else []
        tcb_chain = _pem(self._tcb_certificate, self._root_certificate).decode()
        return dcap_qvl.QuoteCollateralV3(
            pck_crl_issuer_chain=_pem(self._pck_ca_certificate, self._root_certificate).decode(),
            root_ca_crl=_crl(self._root_certificate, self._root, not_after),
            pck_crl=_crl(self._pck_ca_certificate, self._pck_ca, not_after, serials),
            tcb_info_issuer_chain=tcb_chain,
            tcb_info=tcb_info,
            tcb_info_signature=_signature(self._tcb_signing, tcb_info.encode()),
            qe_identity_issuer_chain=tcb_chain,
            qe_identity=qe_identity,
            qe_identity_signature=_signature(self._tcb_signing, qe_identity.encode()),
        )

    def sgx_quote(
        self,
        *,
        mrenclave: bytes,
        mrsigner: bytes,
        isv_prod_id: int,
        isv_svn: int,
        report_data: bytes,
        debug: bool = False,
    ) -> bytes:
        """Make the quote of an enclave, version 3.

        Args:
            mrenclave: 32 bytes.
            mrsigner: 32 bytes.
            isv_prod_id: 16 bits.
            isv_svn: 16 bits.
            report_data: 64 bytes.
            debug: whether the enclave's host may read its memory.
        """
        report = _enclave_report(mrenclave, mrsigner, isv_prod_id, isv_svn, report_data, debug=debug)
        return self._quote("sgx", report)

    def tdx_quote(
        self,
        *,
        mrtd: bytes,
        rtmrs: tuple[bytes, bytes, bytes, bytes],
        report_data: bytes,
        debug: bool = False,
        **others: bytes,
    ) -> bytes:
        """Make the quote of a guest, version 4 with a TD report 1.0.

        Args:
            mrtd: 48 bytes.
            rtmrs: 48 bytes each.
            report_data: 64 bytes.
            debug: whether the guest's host may read its memory.
            others: further fields of the report, by dcap-qvl's names (``mr_seam``); they are zero or plausible.
        """
        named = {f"rt_mr{at}": rtmr for at, rtmr in enumerate(rtmrs)}
        attributes = struct.pack("<Q", _TD_ATTRIBUTES | (_TD_DEBUG if debug else 0))
        fields = {"td_attributes": attributes, "mr_td": mrtd, "report_data": report_data, **named, **others}
        for name, value in fields.items():
            _check_length(name, value, len(_TD_REPORT[name]))
        return self._quote("tdx", b"".join({**_TD_REPORT, **fields}.values()))

    def _quote(self, tee: Tee, report: bytes) -> bytes:
        header = struct.pack("<HHI4x", _QUOTE_VERSION[tee], _P256_KEY, _TEE_TYPE[tee]) + _QE_VENDOR + bytes(20)
        signed = header + report
        certified = self._certified_attestation_key(tee)
        if tee == "tdx":
            certified = _certification(_QE_REPORT, certified)
        trailer = _signature(self._attestation, signed) + _public(self._attestation) + certified
        return signed + struct.pack("<I", len(trailer)) + trailer

    def _certified_attestation_key(self, tee: Tee) -> bytes:
        """The quoting enclave's report, which names the key that it signs with, and the certificates above it."""
        named = hashlib.sha256(_public(self._attestation) + _QE_AUTH_DATA).digest() + bytes(32)
        report = _enclave_report(bytes(32), _QE_MRSIGNER, _QE_PROD_ID[tee], _SVN, named)
        chain = _pem(self._pck_certificate, self._pck_ca_certificate, self._root_certificate)
        return (
            report
            + _signature(self._pck, report)
            + struct.pack("<H", len(_QE_AUTH_DATA))
            + _QE_AUTH_DATA
            + _certification(_PCK_CHAIN, chain)
        )


def _enclave_report(
    mrenclave: bytes,
    mrsigner: bytes,
    isv_prod_id: int,
    isv_svn: int,
    report_data: bytes,
    *,
    debug: bool = False,
) -> bytes:
    for name, value, length in (
        ("mrenclave", mrenclave, 32),
        ("mrsigner", mrsigner, 32),
        ("report_data", report_data, 64),
    ):
        _check_length(name, value, length)
    flags, features = struct.unpack("<QQ", _ENCLAVE_ATTRIBUTES)
    return struct.pack(
        "<16s32xQQ32s32x32s96xHH60x64s",
        _SVNS,
        flags | (_ENCLAVE_DEBUG if debug else 0),
        features,
        mrenclave,
        mrsigner,
        isv_prod_id,
        isv_svn,
        report_data,
    )


def _check_length(name: str, value: bytes, length: int) -> None:
    if len(value) != length:
        raise ValueError(f"{name} has {len(value)} bytes; it must have {length}.")


def _certification(kind: int, data: bytes) -> bytes:
    return struct.pack("<HI", kind, len(data)) + data


def _tcb_info(tee: Tee, fmspc: bytes, status: str) -> dict[str, Any]:
    """Return the platform's TCB info with a single level, which it is at."""
    components = [{"svn": svn} for svn in _SVNS]
    tcb = {"sgxtcbcomponents": components, "pcesvn": _SVN}
    info = {"id": tee.upper(), "version": 3, "fmspc": fmspc.hex().upper(), "pceId": "0000", "tcbType": 0}
    if tee == "tdx":
        tcb["tdxtcbcomponents"] = components
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        levels = [_level({"isvsvn": _SVN}, "UpToDate")]
        info["tdxModule"] = module
        info["tdxModuleIdentities"] = [{"id": f"TDX_{_SVN:02X}", **module, "tcbLevels": levels}]
    return {**info, "tcbLevels": [_level(tcb, status)]}


def _qe_identity(tee: Tee, status: str) -> dict[str, Any]:
    return {
        "id": "QE" if tee == "sgx" else "TD_QE",
        "version": 2,
        "miscselect": "00" * 4,
        "miscselectMask": "FF" * 4,
        "attributes": _ENCLAVE_ATTRIBUTES.hex().upper(),
        "attributesMask": "FF" * 8 + "00" * 8,
        "mrsigner": _QE_MRSIGNER.hex().upper(),
        "isvprodid": _QE_PROD_ID[tee],
        "tcbLevels": [_level({"isvsvn": _SVN}, status)],
    }


def _level(tcb: dict[str, Any], status: str) -> dict[str, Any]:
    advisories = [] if status == "UpToDate" else [ADVISORY]
    return {"tcb": tcb, "tcbDate": _iso(VALID_FROM), "tcbStatus": status, "advisoryIDs": advisories}


def _iso(when: dt.datetime) -> str:
    return f"{when.astimezone(dt.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


def _name(role: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Synthetic {role}")])


def _certificate(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    extension: x509.UnrecognizedExtension | None = None,
    *,
    ca: bool = False,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(VALID_UNTIL)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _crl(
    issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey, not_after: dt.datetime, serials: list[int] | None = None
) -> bytes:
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(VALID_FROM)
        .next_update(not_after)
        .add_extension(x509.CRLNumber(1), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for serial in serials or []:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(VALID_FROM)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _signature(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _public(key: ec.EllipticCurvePrivateKey) -> bytes:
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")


def _platform(fmspc: bytes) -> bytes:
    """Encode what a PCK certificate says of its platform, DER."""
    tcb = [_pair(_integer(svn), 2, at) for at, svn in enumerate(_SVNS, start=1)]
    tcb += [_pair(_integer(_SVN), 2, 17), _pair(_octets(_SVNS), 2, 18)]
    ppid, pce_id, standard = _octets(bytes(16)), _octets(bytes(2)), _der(0x0A, b"\x00")
    return _sequence(
        _pair(ppid, 1), _pair(_sequence(*tcb), 2), _pair(pce_id, 3), _pair(_octets(fmspc), 4), _pair(standard, 5)
    )


def _pair(value: bytes, *arcs: int) -> bytes:
    """Encode a value under its name: arcs below Intel's own."""
    return _sequence(_der(0x06, _SGX_OID_DER + bytes(arcs)), value)


def _integer(value: int) -> bytes:
    return _der(0x02, bytes([value]))


def _octets(value: bytes) -> bytes:
    return _der(0x04, value)


def _sequence(*values: bytes) -> bytes:
    return _der(0x30, b"".join(values))


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    wide = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(wide)]) + wide + content
