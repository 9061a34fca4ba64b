"""A worker with a key, as people run it: who may talk to it, what they are told, and what is never shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgpack
import msgspec
import pytest
import torch
import zmq
from tiny_models import random_ids
from typer.testing import CliRunner
from workers import free_port, running_worker

from tsqp.cli import app
from tsqp.config import EnclaveConfig, WorkerConfig
from tsqp.enclave.connect import Peer, connect
from tsqp.errors import ConfigError, PeerKeyError, SetupError, TransportError
from tsqp.launch import local_worker
from tsqp.model.architecture import read_config, weight_shapes
from tsqp.model.digest import model_digest
from tsqp.model.llama import Llama
from tsqp.model.weights import Checkpoint
from tsqp.reports import ErrorReport, KeysReport, PrefillReport, WorkerReady
from tsqp.transport.keys import create, load_public, load_secret
from tsqp.worker.startup import Progress, open_worker

SILENCE_MS = 1000
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Keyed:
    """A worker with a key: its two addresses and its key files."""

    tcp: str
    ipc: str
    public: Path
    secret: Path


@pytest.fixture(scope="module")
def keyed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    public, secret = create(tmp_path_factory.mktemp("keys"), "worker")
    tcp = f"127.0.0.1:{free_port()}"
    options = ["--model", str(tiny_llama), "--device", "cpu", "--listen", tcp, "--key", str(secret)]
    with local_worker(options, "ipc") as ipc:
        yield Keyed(tcp, ipc, public, secret)


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def next_tokens(*arguments: object) -> list[int]:
    code, out, err = run("prefill", "--tokens", 5, "--repeat", 1, "--json", *arguments)
    assert code == 0, err
    return msgspec.json.decode(out, type=PrefillReport).next_tokens


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_an_encrypted_prefill_gives_the_same_next_token(tiny_llama: Path, keyed: Keyed, scheme: str) -> None:
    where = ["--model", tiny_llama, "--worker", getattr(keyed, scheme)]
    expected = next_tokens("--model", tiny_llama, "--level", "local")
    assert next_tokens(*where, "--worker-key", keyed.public) == expected
    assert next_tokens(*where, "--worker-key", load_public(keyed.public).decode()) == expected


def test_the_key_may_come_from_the_environment(tiny_llama: Path, keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSQP_WORKER_KEY", str(keyed.public))
    monkeypatch.setenv("LLAMA_GPU_ENDPOINT", keyed.tcp)
    assert next_tokens("--model", tiny_llama) == next_tokens("--model", tiny_llama, "--level", "local")


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_without_the_key_one_sentence_says_what_is_missing(tiny_llama: Path, keyed: Keyed, scheme: str) -> None:
    address = getattr(keyed, scheme)
    code, out, err = run("prefill", "--model", tiny_llama, "--worker", address, "--tokens", 4, "--json")
    assert code == 3
    assert f"{address} wants an encrypted link: give its public key (--worker-key" in err
    assert msgspec.json.decode(out, type=ErrorReport).error.type == "ConfigError"


def test_with_another_key_the_worker_is_refused(tiny_llama: Path, keyed: Keyed, tmp_path: Path) -> None:
    other, _ = create(tmp_path, "other")
    where = ["--model", tiny_llama, "--worker", keyed.tcp, "--worker-key", other]
    code, out, err = run("prefill", *where, "--tokens", 4, "--json")
    assert code == 5
    assert f"{keyed.tcp} does not hold the key that was given" in err
    assert msgspec.json.decode(out, type=ErrorReport).error.type == "PeerKeyError"


def test_a_worker_in_clear_is_refused_by_who_expects_a_key(tiny_llama: Path, keyed: Keyed) -> None:
    with running_worker(tiny_llama, "tcp") as address:
        code, _, err = run("prefill", "--model", tiny_llama, "--worker", address, "--worker-key", keyed.public)
    assert code == 5
    assert f"{address} does not hold the key that was given, or speaks without encryption" in err


def test_programs_give_the_key_to_connect(tiny_llama: Path, keyed: Keyed, tmp_path: Path) -> None:
    architecture, checkpoint = read_config(tiny_llama), Checkpoint(tiny_llama)
    checkpoint.require(weight_shapes(architecture))
    digest, ids_BT = model_digest(architecture, checkpoint), random_ids(1, 6)
    key, other = load_public(keyed.public), load_public(create(tmp_path, "other")[0])
    with connect(Peer(address=keyed.tcp, key=key), EnclaveConfig(), architecture, digest) as link:
        encrypted_BV = Llama(architecture, link.ops).prefill(ids_BT)
    with (
        running_worker(tiny_llama, "tcp") as address,
        connect(Peer(address=address), EnclaveConfig(), architecture, digest) as link,
    ):
        assert torch.equal(Llama(architecture, link.ops).prefill(ids_BT), encrypted_BV)
    impostor = Peer(address=keyed.tcp, key=other)
    with pytest.raises(PeerKeyError), connect(impostor, EnclaveConfig(), architecture, digest):
        pass


def test_a_worker_with_an_allow_list_serves_who_is_on_it(tiny_llama: Path, keyed: Keyed, tmp_path: Path) -> None:
    known, own = create(tmp_path, "enclave")
    _, other = create(tmp_path, "other")
    tcp = f"127.0.0.1:{free_port()}"
    options = ["--model", str(tiny_llama), "--device", "cpu", "--listen", tcp, "--key", str(keyed.secret)]
    where = ["--model", tiny_llama, "--worker", tcp, "--worker-key", keyed.public]
    with local_worker([*options, "--allow", str(known)], "ipc"):
        for strangers in ([], ["--own-key", other]):
            code, out, err = run("prefill", *where, "--tokens", 4, "--json", *strangers)
            assert code == 3
            assert f"{tcp} lets only those in whose keys it was told (--allow), and not this process" in err
            assert msgspec.json.decode(out, type=ErrorReport).error.type == "KeyRefusedError"
        assert next_tokens(*where, "--own-key", own)


def test_a_list_and_an_own_key_need_encrypted_links(tiny_llama: Path, keyed: Keyed, tmp_path: Path) -> None:
    public, secret = create(tmp_path, "enclave")
    for command, address in (("worker", f"ipc://{tmp_path}/worker"), ("dealer", f"ipc://{tmp_path}/dealer")):
        code, _, err = run(command, "--model", tiny_llama, "--listen", address, "--allow", public)
        assert code == 3
        assert "an allow-list is checked where links are encrypted" in err
    code, _, err = run("prefill", "--model", tiny_llama, "--worker", keyed.tcp, "--own-key", secret)
    assert code == 3
    assert "an own key is of use on encrypted links only" in err


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_clients_of_the_first_protocol_get_no_answer(tiny_llama: Path, keyed: Keyed, scheme: str) -> None:
    address = f"tcp://{keyed.tcp}" if scheme == "tcp" else keyed.ipc
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.setsockopt(zmq.LINGER, 0)
        client.connect(address)
        client.send(msgpack.packb({"method": "RegisterClient", "request": {"module_names": []}}))
        assert not client.poll(SILENCE_MS)
    assert next_tokens("--model", tiny_llama, "--worker", keyed.tcp, "--worker-key", keyed.public)


def test_a_key_without_a_worker_is_a_mistake(tiny_llama: Path, keyed: Keyed) -> None:
    code, _, err = run("prefill", "--model", tiny_llama, "--worker-key", keyed.public)
    assert code == 3
    assert "a worker's key was given but no worker" in err


def test_a_key_that_is_none_is_named_before_anything_is_sent(tiny_llama: Path, keyed: Keyed) -> None:
    code, _, err = run("prefill", "--model", tiny_llama, "--worker", keyed.tcp, "--worker-key", "rubbish")
    assert code == 3
    assert "a key file does not exist" in err
    shm = "shm:///no/such/worker"
    code, _, err = run("prefill", "--model", tiny_llama, "--worker", shm, "--worker-key", keyed.public)
    assert code == 3
    assert f"{shm}: shared memory carries no encryption" in err


def test_the_note_about_a_link_in_clear_is_for_links_in_clear(tiny_llama: Path, keyed: Keyed) -> None:
    """0.0.0.0 counts as another machine, and reaches this one."""
    where = ["--model", tiny_llama, "--worker", keyed.tcp.replace("127.0.0.1", "0.0.0.0"), "--tokens", 4]  # noqa: S104
    code, _, err = run("prefill", *where, "--worker-key", keyed.public)
    assert code == 0, err
    assert "unencrypted" not in err
    code, _, err = run("prefill", *where)
    assert code == 3
    assert "is beyond this machine, and without a key everything would cross the network in clear" in err
    _, _, err = run("prefill", *where, "--insecure")
    assert "is not on this machine: activations travel to it unencrypted" in err


@pytest.mark.parametrize("encrypted", [True, False], ids=["curve", "clear"])
def test_the_workers_notice_says_whether_links_are_encrypted(
    tiny_llama: Path, keyed: Keyed, *, encrypted: bool
) -> None:
    notices: list[str] = []
    config = WorkerConfig(
        model=str(tiny_llama),
        device="cpu",
        listen=(f"0.0.0.0:{free_port()}",),
        threads=torch.get_num_threads(),
        key=str(keyed.secret) if encrypted else None,
        insecure="off" if encrypted else "on",
    )
    running = open_worker(config, Progress(notices.append, lambda _name, _done: None))
    running.transport.close()
    (notice,) = [notice for notice in notices if "open to the network" in notice]
    assert ("unencrypted" in notice) is not encrypted
    assert running.public_key == (load_public(keyed.public).decode() if encrypted else None)


@pytest.mark.parametrize(("command", "port"), [("worker", "50051"), ("dealer", "50052")])
def test_beyond_this_machine_nobody_listens_in_clear_unasked(tiny_llama: Path, command: str, port: str) -> None:
    code, _, err = run(command, "--model", tiny_llama, "--listen", "127.0.0.1:1", "--listen", f"0.0.0.0:{port}")
    assert code == 3
    assert f"0.0.0.0:{port} is beyond this machine, and without a key everything would cross the network" in err
    assert "('tsqp keys new')" in err
    assert "or say --insecure (TSQP_INSECURE=on)" in err


def test_a_program_meets_nobody_in_clear_beyond_this_machine(tiny_llama: Path) -> None:
    architecture, checkpoint = read_config(tiny_llama), Checkpoint(tiny_llama)
    checkpoint.require(weight_shapes(architecture))
    away, digest = Peer(address="192.0.2.7:1"), model_digest(architecture, checkpoint)
    with (
        pytest.raises(ConfigError, match="is beyond this machine"),
        connect(away, EnclaveConfig(), architecture, digest),
    ):
        pass
    meant = EnclaveConfig(insecure="on", connect_timeout_s=0.01)
    with pytest.raises(TransportError), connect(away, meant, architecture, digest):
        pass


def test_a_worker_reports_its_public_key_and_shows_its_secret_nowhere(tiny_llama: Path, keyed: Keyed) -> None:
    command = [sys.executable, "-m", "tsqp", "worker", "--model", str(tiny_llama), "--device", "cpu", "--json"]
    command += ["--listen", f"127.0.0.1:{free_port()}", "--exit-with-parent", "--key", str(keyed.secret)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        rest, err = process.communicate(timeout=PATIENCE_S)
    pair = load_secret(keyed.secret)
    assert msgspec.json.decode(line, type=WorkerReady).public_key == pair.public.decode()
    assert pair.secret.decode() not in line + rest + err


def test_a_worker_refuses_a_key_that_others_can_read_and_one_for_shared_memory(
    tiny_llama: Path, tmp_path: Path
) -> None:
    public, secret = create(tmp_path, "worker")
    base = ["worker", "--model", tiny_llama, "--listen"]
    code, _, err = run(*base, f"shm://{tmp_path}/worker", "--key", secret)
    assert code == 3
    assert "shared memory carries no encryption; with a key use tcp or ipc" in err
    code, _, err = run(*base, f"ipc://{tmp_path}/worker", "--key", public)
    assert code == 3
    assert "worker.key holds no secret key" in err
    secret.chmod(0o644)
    code, _, err = run(*base, f"ipc://{tmp_path}/worker", "--key", secret)
    assert code == 3
    assert "can be read by others (mode 0644)" in err


def test_a_local_worker_does_not_take_a_key_it_cannot_use(
    tiny_llama: Path, keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSQP_KEY", str(keyed.secret))
    with (
        pytest.raises(SetupError, match=r"did not start: .* shared memory carries no encryption"),
        local_worker(["--model", str(tiny_llama), "--device", "cpu"], "shm"),
    ):
        pass


def test_keys_new_makes_two_files_and_shows_the_public_key(tmp_path: Path) -> None:
    code, out, err = run("keys", "new", "dealer", "--out", tmp_path, "--json")
    assert code == 0, err
    report = msgspec.json.decode(out, type=KeysReport)
    pair = load_secret(tmp_path / "dealer.key_secret")
    assert report == KeysReport(
        name="dealer",
        public_key=pair.public.decode(),
        public_file=str(tmp_path / "dealer.key"),
        secret_file=str(tmp_path / "dealer.key_secret"),
    )
    code, text, err = run("keys", "new", "second", "--out", tmp_path)
    assert code == 0, err
    second = load_secret(tmp_path / "second.key_secret")
    assert text.splitlines()[0] == second.public.decode()
    assert pair.secret.decode() not in out
    assert second.secret.decode() not in text


@pytest.mark.parametrize("suffix", [".key", ".key_secret"])
def test_keys_show_takes_either_file_and_never_shows_the_secret(tmp_path: Path, suffix: str) -> None:
    public, secret = create(tmp_path, "worker")
    pair, file = load_secret(secret), tmp_path / f"worker{suffix}"
    code, out, err = run("keys", "show", file)
    assert (code, out) == (0, pair.public.decode() + "\n"), err
    code, out, _ = run("keys", "show", file, "--json")
    report = msgspec.json.decode(out, type=KeysReport)
    assert (report.name, report.public_key) == ("worker", pair.public.decode())
    assert report.public_file == (str(public) if suffix == ".key" else None)
    assert report.secret_file == (None if suffix == ".key" else str(secret))
    assert pair.secret.decode() not in out


def test_mistakes_with_keys_get_one_sentence(tmp_path: Path) -> None:
    create(tmp_path, "worker")
    code, out, err = run("keys", "new", "worker", "--out", tmp_path, "--json")
    assert code == 3
    assert "exists already and is never overwritten" in err
    assert msgspec.json.decode(out, type=ErrorReport).error.exit_code == 3
    code, out, err = run("keys", "show", tmp_path / "none.key")
    assert (code, out) == (3, "")
    assert "cannot read the key file" in err
    secret = load_secret(tmp_path / "worker.key_secret").secret.decode()
    for command in (("keys", "show", "--json", "--", secret), ("worker", "--json", "--key", secret)):
        code, out, err = run(*command)  # a key may begin with "-"
        assert code == 3
        assert secret[:20] not in out + err


@pytest.mark.parametrize("command", ["new", "show"])
def test_help_is_quick_to_ask_for(command: str) -> None:
    code = (
        "import sys; from tsqp.cli import main\n"
        f"sys.argv = ['tsqp', 'keys', '{command}', '--help']\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert os.linesep in done.stdout
