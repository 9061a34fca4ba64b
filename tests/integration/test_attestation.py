"""Attestation over real TLS: quotes under a root of their own, clients that check, and those who stand between."""

from __future__ import annotations

import asyncio
import http.client
import json
import pickle
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from fake_engine import MODEL, FakeEngine
from http_server import Running, http_server, own_certificate
from serving import metrics_of
from synthetic_quotes import Authority
from typer.testing import CliRunner

from tsqp import client
from tsqp.attest.attesters import NoAttester
from tsqp.attest.claims import Claims
from tsqp.attest.evidence import Tee
from tsqp.cli import app
from tsqp.config import EnclaveConfig, EngineConfig, ServeConfig
from tsqp.errors import (
    AttestationError,
    ClaimsError,
    ConfigError,
    EvidenceError,
    InternalError,
    MeasurementError,
    NoTeeError,
    ReportDataError,
    SetupError,
    TransportError,
)
from tsqp.reports import ErrorReport, VerifyReport
from tsqp.serve.attestation import Identity, claims_of
from tsqp.serve.errors import ApiError
from tsqp.serve.keys import new_key
from tsqp.serve.server import check_exposure
from tsqp.transport.keys import create, load_public

AUTHORITY = Authority()
ENCLAVE, SIGNER = b"\x11" * 32, b"\x22" * 32
FIRMWARE, RTMRS = b"\x33" * 48, (b"\x40" * 48, b"\x41" * 48, b"\x42" * 48, b"\x43" * 48)
CLAIMS = Claims(version="3.0", level="masked", masks="enclave", workers=("",), dealers=(), model_digest="ab" * 32)
CHAT: Any = [{"role": "user", "content": "Hi"}]


class SyntheticAttester:
    """Quotes whatever it is given, as a processor under this authority."""

    def __init__(self, tee: Tee = "sgx") -> None:
        self.tee: Tee = tee

    def quote(self, data: bytes) -> bytes:
        if self.tee == "sgx":
            return AUTHORITY.sgx_quote(mrenclave=ENCLAVE, mrsigner=SIGNER, isv_prod_id=7, isv_svn=3, report_data=data)
        return AUTHORITY.tdx_quote(mrtd=FIRMWARE, rtmrs=RTMRS, report_data=data)


def identity(attester: Any = None, claims: Claims = CLAIMS) -> Identity:
    made = Identity(attester or SyntheticAttester())
    made.claim(claims)
    return made


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """What the enclaves of these tests are: this build, under this authority."""
    return written(
        tmp_path, f'[sgx]\nmrenclave = "{ENCLAVE.hex()}"\n[claims]\nlevel = "masked"\nmodel_digest = "{"ab" * 32}"'
    )


def written(directory: Path, text: str, tee: Tee = "sgx") -> Path:
    (directory / "root.der").write_bytes(AUTHORITY.root_der)
    (directory / "collateral.json").write_text(AUTHORITY.collateral(tee).to_json())  # type: ignore[arg-type]
    file = directory / "policy.toml"
    file.write_text(f'{text}\n[collateral]\nfile = "collateral.json"\nroot_ca = "root.der"\n')
    return file


@contextmanager
def serving(
    engine: FakeEngine | None = None, own: Identity | None = None, api_keys: str | None = None
) -> Iterator[Running]:
    with http_server(engine or FakeEngine(), level="masked", identity=own or identity(), api_keys=api_keys) as server:
        assert server.url.startswith("https://")
        yield server


def verified(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, words)])
    return result.exit_code, result.output


def test_openais_client_over_an_attested_connection(policy: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secret = new_key(keys, "alice")
    with serving(api_keys=str(keys)) as server:
        with client.OpenAI(f"{server.url}/v1", policy, api_key=secret) as asking:
            assert isinstance(asking, openai.OpenAI)
            answer = asking.chat.completions.create(model=MODEL, messages=CHAT)
            assert answer.choices[0].message.content == "Hello, world"
            streamed = asking.completions.create(model=MODEL, prompt="Hi", stream=True)
            assert "".join(piece.choices[0].text for piece in streamed if piece.choices) == "Hello, world"

        async def ask() -> str | None:
            async with client.AsyncOpenAI(f"{server.url}/v1", policy, api_key=secret) as asking:
                return (await asking.chat.completions.create(model=MODEL, messages=CHAT)).choices[0].message.content

        assert asyncio.run(ask()) == "Hello, world"


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
def test_the_command_says_what_was_proved(tee: Tee, tmp_path: Path) -> None:
    registers = "\n".join(f'rtmr{at} = "{value.hex()}"' for at, value in enumerate(RTMRS))
    pinned = f'[tdx]\nmrtd = "{FIRMWARE.hex()}"\n{registers}'
    if tee == "sgx":
        pinned = f'[sgx]\nmrsigner = "{SIGNER.hex()}"\nisv_prod_id = 7\nmin_isv_svn = 3'
    policy = written(tmp_path, pinned, tee)
    with serving(own=identity(SyntheticAttester(tee))) as server:
        code, out = verified(server.url, "--policy", policy)
        assert (code, "UpToDate" in out, "masked" in out) == (0, True, True)
        code, out = verified(server.url, "--policy", policy, "--json")
    assert code == 0
    report = msgspec.json.decode(out, type=VerifyReport)
    assert (report.url, report.tee, report.tcb_status) == (server.url, tee, "UpToDate")
    assert (
        report.measurements["mr_enclave" if tee == "sgx" else "mr_td"] == (ENCLAVE if tee == "sgx" else FIRMWARE).hex()
    )
    assert report.claims == msgspec.json.decode(CLAIMS.encode())


def test_nothing_is_sent_to_an_enclave_that_fails(policy: Path) -> None:
    """No prompt, no API key: only the question for evidence."""
    engine = FakeEngine()
    text = policy.read_text()
    with serving(engine) as server:
        for changed, error, message in (
            (text.replace("11", "12"), MeasurementError, "other code runs there"),
            (text.replace('"masked"', '"local"'), ClaimsError, "level is 'masked'; the policy wants 'local'"),
        ):
            policy.write_text(changed)
            with pytest.raises(error, match=message):
                client.OpenAI(f"{server.url}/v1", policy, api_key="secret")
            code, out = verified(server.url, "--policy", policy, "--json")
            assert code == AttestationError.exit_code
            assert msgspec.json.decode(out.splitlines()[0], type=ErrorReport).error.type == error.__name__
        asked = http_requests(server)
    assert engine.submitted == []
    assert asked == {"/v1/attestation"}


def http_requests(server: Running) -> set[str]:
    """Return which paths have been asked for, by the server's own count."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with urllib.request.urlopen(f"{server.url}/metrics", context=context) as answer:  # noqa: S310  our own address
        counts = metrics_of(answer.read().decode())
    return {labels[0] for (name, labels), _ in counts.items() if name == "tsqp_http_requests_total"}


def test_a_server_for_development_is_refused(policy: Path) -> None:
    with serving(own=identity(NoAttester())) as server:
        code, out = verified(server.url, "--policy", policy)
    assert code == AttestationError.exit_code
    assert "no trusted execution environment: its attestation is 'none'" in " ".join(out.split())


def test_servers_without_attestation_are_refused(policy: Path, tmp_path: Path) -> None:
    cert, key = (str(path) for path in own_certificate(tmp_path))
    refused = pytest.raises(NoTeeError, match=r"offers no attestation \(HTTP 404")
    with http_server(FakeEngine(), tls_cert=cert, tls_key=key) as server, refused:
        client.OpenAI(f"{server.url}/v1", policy)
    with http_server(FakeEngine()) as server:
        with pytest.raises(ConfigError, match="expected https://HOST:PORT; only TLS can be attested"):
            client.OpenAI(f"{server.url}/v1", policy)
        with pytest.raises(TransportError, match=r"does not speak TLS 1\.3"):
            client.AttestedServer(server.url.replace("http:", "https:"), policy)
    with pytest.raises(TransportError, match="does not answer: Connection refused"):
        client.AttestedServer(server.url.replace("http:", "https:"), policy)
    with pytest.raises(ConfigError, match=r"nowhere\.invalid cannot be resolved"):
        client.AttestedServer("https://nowhere.invalid", policy)


@contextmanager
def between(server: Running, context: ssl.SSLContext) -> Iterator[str]:
    """Run somebody who ends TLS with a key of their own and passes everything on, reading it."""
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    own.check_hostname, own.verify_mode = False, ssl.CERT_NONE
    host, port = server.url.removeprefix("https://").split(":")

    def serve_one(listening: socket.socket) -> None:
        link, _ = listening.accept()
        with (
            context.wrap_socket(link, server_side=True) as near,
            own.wrap_socket(socket.create_connection((host, int(port)))) as far,
        ):
            far.sendall(near.recv(1 << 16).replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
            while piece := far.recv(1 << 16):
                near.sendall(piece)

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        thread = threading.Thread(target=serve_one, args=(listening,))
        thread.start()
        yield f"https://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


def test_somebody_who_passes_on_the_evidence_of_another_is_refused(policy: Path, tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*own_certificate(tmp_path))
    with serving() as server, between(server, context) as url:
        client.AttestedServer(server.url, policy)
        with pytest.raises(ReportDataError, match="does not belong to this connection"):
            client.AttestedServer(url, policy)


def test_a_connection_to_another_key_fails_after_the_proof(policy: Path, tmp_path: Path) -> None:
    """As if the address were taken over: same host and port, another key, even one that could prove itself."""
    others = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    others.load_cert_chain(*own_certificate(tmp_path))
    with serving() as server:
        proved = client.AttestedServer(server.url, policy)
        port = int(server.url.rsplit(":", 1)[1])
    for context in (others, identity().context()):
        with closing(socket.create_server(("127.0.0.1", port), reuse_port=False)) as listening:
            threading.Thread(target=accepted, args=(listening, context), daemon=True).start()
            link = socket.create_connection(("127.0.0.1", port))
            with closing(link), pytest.raises(ssl.SSLCertVerificationError):
                proved.context().wrap_socket(link)


def accepted(listening: socket.socket, context: ssl.SSLContext) -> None:
    link, _ = listening.accept()
    try:
        context.wrap_socket(link, server_side=True).close()
    except OSError:
        link.close()


def test_evidence_is_for_everybody_and_wants_a_nonce(tmp_path: Path) -> None:
    """Before a client trusts a server with a key, it must be able to ask."""
    keys = tmp_path / "keys.json"
    new_key(keys, "alice")
    with serving(api_keys=str(keys)) as server:
        for query in ("", "?nonce=", "?nonce=12", f"?nonce={'A' * 64}", f"?nonce={'0' * 65}"):
            status, body = fetched(server, f"/v1/attestation{query}")
            assert (status, body["error"]["code"]) == (400, "invalid_nonce")
        status, first = fetched(server, f"/v1/attestation?nonce={'0' * 64}")
        assert (status, first["tee"]) == (200, "sgx")
        assert fetched(server, f"/v1/attestation?nonce={'1' * 64}")[1]["quote"] != first["quote"]
        assert fetched(server, "/v1/models")[0] == 401


def fetched(server: Running, path: str) -> tuple[int, Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with closing(http.client.HTTPSConnection(server.url.removeprefix("https://"), context=context)) as link:
        link.request("GET", path)
        answer = link.getresponse()
        return answer.status, json.loads(answer.read())


def test_a_platform_that_gives_no_quote_is_said(policy: Path) -> None:
    class Broken(SyntheticAttester):
        def quote(self, data: bytes) -> bytes:  # noqa: ARG002
            raise SetupError("cannot read /dev/attestation/quote (Input/output error).")

    refused = pytest.raises(EvidenceError, match=r"gave no evidence: HTTP 503, .*no quote can be made now")
    with serving(own=identity(Broken())) as server, refused:
        client.AttestedServer(server.url, policy)


def test_no_more_than_so_many_wait_for_a_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqp.serve.attestation.MAX_ASKING", 2)
    release = threading.Event()

    class Slow(SyntheticAttester):
        def quote(self, data: bytes) -> bytes:
            release.wait(60)
            return super().quote(data)

    async def ask() -> list[bytes | BaseException]:
        slow = identity(Slow())
        slow.claim(claims_of(EnclaveConfig(level="local"), EngineConfig(), "ab" * 32))
        asking = [asyncio.create_task(slow.evidence("0" * 64)) for _ in range(3)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        release.set()
        await asyncio.gather(*asking, return_exceptions=True)
        return [*await asyncio.gather(*asking, return_exceptions=True), await slow.evidence("1" * 64)]

    first, second, third, later = asyncio.run(ask())
    assert isinstance(third, ApiError)
    assert (third.status, third.code) == (503, "no_quote")
    assert "2 others wait" in str(third)
    assert all(isinstance(each, bytes) for each in (first, second, later))


def test_a_client_needs_no_torch() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import sys, tsqp.client, tsqp.cli.verify; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "False\n"


def test_claims_are_the_settings_that_the_server_runs_with(tmp_path: Path) -> None:
    worker, _ = create(tmp_path, "worker")
    dealer, _ = create(tmp_path, "dealer")
    keys = [load_public(each).decode() for each in (worker, dealer)]
    enclave = EnclaveConfig(
        level="masked", dealers=("tcp://d:1",), dealer_keys=(str(dealer),), masks="dealers", worker_key=str(worker)
    )
    found = claims_of(enclave, EngineConfig(), "cd" * 32)
    assert (found.level, found.masks, found.model_digest) == ("masked", "dealers", "cd" * 32)
    assert (found.workers, found.dealers) == ((keys[0],), (keys[1],))
    found = claims_of(EnclaveConfig(level="open"), EngineConfig(workers=("tcp://a:1", "tcp://b:1")), "")
    assert (found.masks, found.workers, found.dealers) == ("", ("", ""), ())
    assert claims_of(EnclaveConfig(level="local"), EngineConfig(), "").workers == ()
    # Of a directory's peers the keys that are pinned, wherever it says that they are.
    following = replace(enclave, worker_key=None, dealers=(), masks=None)
    found = claims_of(following, EngineConfig(directory="pool.json", worker_keys=(str(worker),)), "")
    assert (found.masks, found.workers, found.dealers) == ("dealers", (keys[0],), (keys[1],))
    assert claims_of(following, EngineConfig(directory="pool.json"), "").workers == ("",)


def test_a_key_from_a_file_is_none_to_be_attested(tmp_path: Path) -> None:
    cert, key = (str(path) for path in own_certificate(tmp_path))
    notices: list[str] = []
    with pytest.raises(ConfigError, match="with attestation the server makes its own TLS key"):
        check_exposure(ServeConfig(tls_cert=cert, tls_key=key), notices.append, own_key=True)
    check_exposure(ServeConfig(host="192.0.2.1", api_keys="f"), notices.append, own_key=True)
    assert notices == []


def test_the_key_is_not_shown_and_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = identity()
    made.context()
    assert list(tmp_path.iterdir()) == []
    assert repr(made) == "Identity(sgx, key not shown)"
    with pytest.raises(InternalError, match="must not leave its process"):
        pickle.dumps(made)
