"""A client that sends nothing to a server before it has proved what it is: ``tsqp.client.OpenAI``, and ``tsqp verify``.

The server's certificate is its own and says nothing. It is fetched, its key is asked to be attested with a fresh nonce,
and from then on every connection must show that very certificate: its key is what the quote speaks for.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tsqp.attest.claims import NONCE_BYTES
from tsqp.attest.evidence import MAX_EVIDENCE_BYTES, Evidence, decode_evidence
from tsqp.attest.policy import Policy, read_policy
from tsqp.errors import ConfigError, EvidenceError, InternalError, NoTeeError, SetupError, TransportError, printable
from tsqp.reports import VerifyReport

if TYPE_CHECKING:
    import openai

    from tsqp.attest.verifier import Attested

_TIMEOUT_S = 30.0
_PATH = "/v1/attestation"
_NOT_FOUND = (404, 401, 403)


class AttestedServer:
    """A server that has proved what it is.

    Args:
        url: ``https://HOST:PORT``, with or without a path such as ``/v1``.
        policy: what is accepted, or the path of a file that says it.
        timeout_s: for connecting and for the answer.

    Attributes:
        attested: what was proved.

    Raises:
        AttestationError: it has not; its class says what is missing.
        ConfigError: the address or the policy cannot be used.
        CollateralError: there is nothing to verify a quote with.
        TransportError: the server, or the collateral's, does not answer.
        SetupError: ``dcap-qvl`` is not installed.
    """

    def __init__(self, url: str, policy: Policy | str | Path, *, timeout_s: float = _TIMEOUT_S) -> None:
        verify = _verifier()
        self._url = url
        place = _place(url)
        accepted = policy if isinstance(policy, Policy) else read_policy(Path(policy))
        nonce = os.urandom(NONCE_BYTES)
        evidence, self._certificate = _asked(place, nonce, timeout_s)
        key = x509.load_der_x509_certificate(self._certificate).public_key()
        public_key = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.attested: Attested = verify(evidence, accepted, nonce=nonce, public_key=public_key)

    def report(self) -> VerifyReport:
        """Return what was proved, for ``tsqp verify``."""
        proved = self.attested
        return VerifyReport(
            url=self._url,
            tee=proved.tee,
            measurements=dict(proved.measurements),
            tcb_status=proved.status,
            advisories=list(proved.advisories),
            claims=msgspec.to_builtins(proved.claims),
        )

    def context(self) -> ssl.SSLContext:
        """Return a client's TLS context in which that server, and no other, passes."""
        context = _context()
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self._certificate)
        return context


def OpenAI(base_url: str, policy: Policy | str | Path, **options: Any) -> openai.OpenAI:  # noqa: ANN401, N802
    """Return the ordinary ``openai.OpenAI``, whose every connection is to a server that has proved what it is.

    Args:
        base_url: ``https://HOST:PORT/v1``.
        policy: what is accepted, or the path of a file that says it.
        options: of ``openai.OpenAI``, such as ``api_key``; without one the word ``none`` is sent, no variable's.

    Raises:
        As ``AttestedServer``; also SetupError where ``openai`` is not installed.
    """
    client, server = _openai(), AttestedServer(base_url, policy)
    http_client = client.DefaultHttpxClient(verify=server.context(), follow_redirects=False)
    made: openai.OpenAI = client.OpenAI(**_options(base_url, options), http_client=http_client)
    return made


def AsyncOpenAI(base_url: str, policy: Policy | str | Path, **options: Any) -> openai.AsyncOpenAI:  # noqa: ANN401, N802
    """Return ``openai.AsyncOpenAI`` likewise. It proves the server before it returns, and blocks until then."""
    client, server = _openai(), AttestedServer(base_url, policy)
    http_client = client.DefaultAsyncHttpxClient(verify=server.context(), follow_redirects=False)
    made: openai.AsyncOpenAI = client.AsyncOpenAI(**_options(base_url, options), http_client=http_client)
    return made


def _options(base_url: str, options: dict[str, Any]) -> dict[str, Any]:
    if "http_client" in options:
        raise ConfigError("http_client cannot be given: the attested connection is one.")
    return {"api_key": "none", **options, "base_url": base_url}


def _openai() -> Any:  # noqa: ANN401
    try:
        import openai  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[client]'.") from error
    return openai


def _verifier() -> Any:  # noqa: ANN401
    try:
        from tsqp.attest.verifier import verify  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[client]'.") from error
    return verify


def _place(url: str) -> SplitResult:
    try:
        place = urlsplit(url)
        known = place.scheme == "https" and place.hostname and (place.port or True)
    except ValueError:
        known = False
    if not known:
        raise ConfigError(f"{printable(url)}: expected https://HOST:PORT; only TLS can be attested.")
    return place


def _asked(place: SplitResult, nonce: bytes, timeout_s: float) -> tuple[Evidence, bytes]:
    """Ask for evidence; return it, and the certificate of the connection it came over, DER."""
    with _connected(place, timeout_s) as connection:
        certificate = _certificate(connection.sock)
        connection.request("GET", f"{_PATH}?nonce={nonce.hex()}", headers={"accept": "application/json"})
        answer = connection.getresponse()
        body = answer.read(MAX_EVIDENCE_BYTES + 1)
    if answer.status in _NOT_FOUND:
        raise NoTeeError(
            f"{place.netloc} offers no attestation (HTTP {answer.status} at {_PATH}): it is no TSQP server, or one "
            "that runs with --attestation off."
        )
    if answer.status != http.client.OK:
        said = printable(body.decode(errors="replace"))
        raise EvidenceError(f"{place.netloc} gave no evidence: HTTP {answer.status}, {said}")
    return decode_evidence(body), certificate


def _certificate(link: socket.socket | None) -> bytes:
    found = link.getpeercert(binary_form=True) if isinstance(link, ssl.SSLSocket) else None
    if found is None:
        raise InternalError("a TLS connection without a certificate.")
    return found


@contextlib.contextmanager
def _connected(place: SplitResult, timeout_s: float) -> Iterator[http.client.HTTPSConnection]:
    connection = http.client.HTTPSConnection(place.hostname or "", place.port, timeout=timeout_s, context=_context())
    try:
        connection.connect()
        yield connection
    except ssl.SSLError as error:
        raise TransportError(f"{place.netloc} does not speak TLS 1.3: {error.reason or error}.") from error
    except socket.gaierror as error:
        raise ConfigError(f"{place.hostname} cannot be resolved: {error.strerror}.") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise TransportError(f"{place.netloc} does not answer: {reason}.") from error
    finally:
        connection.close()


def _context() -> ssl.SSLContext:
    """Return a context that takes any certificate: what it is worth is found out by attestation."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
