"""Where quotes come from, against stand-ins for the kernel's and Gramine's files."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tsqp.attest import attesters
from tsqp.attest.attesters import GramineAttester, NoAttester, TdxAttester, attester_for
from tsqp.errors import ConfigError, InternalError, SetupError

DATA = bytes(range(64))


class GramineFiles(type(Path())):  # type: ignore[misc]  # of the platform's own kind
    """Gramine's pseudo-files: a quote is of what was written last."""

    def read_bytes(self) -> bytes:
        if self.name != "quote":
            return bytes(super().read_bytes())
        return b"sgx quote of " + (Path(self.parent) / "user_report_data").read_bytes()


class Configfs(type(Path())):  # type: ignore[misc]
    """The kernel's: a directory that is made has its files, and what is read is of the last write."""

    provider = b"tdx_guest\n"
    disturbed = 0

    def mkdir(self, mode: int = 0o777, *args: bool) -> None:
        super().mkdir(mode, *args)
        for name in ("generation", "provider", "outblob"):
            (Path(self) / name).touch()

    def rmdir(self) -> None:
        for file in Path(self).iterdir():
            file.unlink()
        super().rmdir()

    def read_bytes(self) -> bytes:
        if self.name == "provider":
            return self.provider
        if self.name == "generation":
            if type(self).disturbed:
                type(self).disturbed -= 1
                return str(type(self).disturbed).encode()
            return b"1\n"
        return b"tdx quote of " + (Path(self.parent) / "inblob").read_bytes()


@pytest.fixture
def gramine(tmp_path: Path) -> GramineFiles:
    (tmp_path / "attestation_type").write_text("dcap\n")
    (tmp_path / "user_report_data").touch()
    return GramineFiles(tmp_path)


def test_gramine_quotes_what_is_written(gramine: GramineFiles) -> None:
    attester = GramineAttester(gramine)
    assert attester.tee == "sgx"
    assert attester.quote(DATA) == b"sgx quote of " + DATA


def test_threads_do_not_get_each_others_quotes(gramine: GramineFiles) -> None:
    attester = GramineAttester(gramine)
    wrong: list[int] = []

    def ask(number: int) -> None:
        data = bytes([number]) * 64
        wrong.extend(number for _ in range(200) if attester.quote(data) != b"sgx quote of " + data)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gramine_without_attestation_is_refused(gramine: GramineFiles, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"is this process running under gramine-sgx\?"):
        GramineAttester(tmp_path / "none")
    (tmp_path / "attestation_type").write_text("none")
    with pytest.raises(SetupError, match=r'sgx\.remote_attestation = "dcap"'):
        GramineAttester(gramine)


def test_a_tdx_guest_quotes_what_is_written_and_leaves_nothing(tmp_path: Path) -> None:
    attester = TdxAttester(Configfs(tmp_path))
    assert attester.tee == "tdx"
    assert attester.quote(DATA) == b"tdx quote of " + DATA
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_somebody_else_changed_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Configfs, "disturbed", 4)
    assert TdxAttester(Configfs(tmp_path)).quote(DATA) == b"tdx quote of " + DATA
    monkeypatch.setattr(Configfs, "disturbed", 100)
    with pytest.raises(SetupError, match="others keep writing"):
        TdxAttester(Configfs(tmp_path)).quote(DATA)
    assert list(tmp_path.iterdir()) == []


def test_a_guest_of_another_kind_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Configfs, "provider", b"sev_guest\n")
    with pytest.raises(SetupError, match="gives reports of sev_guest, not of tdx_guest"):
        TdxAttester(Configfs(tmp_path)).quote(DATA)
    with pytest.raises(SetupError, match="module tdx_guest loaded"):
        TdxAttester(tmp_path / "none")


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_has_one_length(size: int, gramine: GramineFiles, tmp_path: Path) -> None:
    for attester in (GramineAttester(gramine), TdxAttester(Configfs(tmp_path)), NoAttester()):
        with pytest.raises(InternalError, match=f"{size} bytes of report data"):
            attester.quote(bytes(size))


@pytest.mark.parametrize(
    ("tee", "backend", "error"),
    [("SGX", "gramine", "gramine-sgx"), ("TDX", "tdx", "tdx_guest"), (None, "off", None)],
)
def test_auto_is_by_the_tee_and_nothing_weaker(
    tee: str | None, backend: str, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attesters, "tee_name", lambda: tee)
    if error is None:
        assert attester_for("auto") is None
        assert attester_for(backend) is None
        return
    for name in ("auto", backend):
        with pytest.raises(SetupError, match=error):  # it is not here, and there is no going on without
            attester_for(name)


def test_for_development_there_is_one_that_proves_nothing() -> None:
    attester = attester_for("none")
    assert attester is not None
    assert (attester.tee, attester.quote(DATA)) == ("none", b"")
    with pytest.raises(ConfigError, match="attestation sev: expected auto, off, none, gramine or tdx"):
        attester_for("sev")
