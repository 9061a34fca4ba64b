"""Key files: made private, read strictly, and secrets that show up nowhere."""

from __future__ import annotations

import copy
import os
import pickle
import stat
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
import zmq.auth
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from tsqp.errors import ConfigError, InternalError, SetupError
from tsqp.transport.keys import KeyPair, check_public, create, ephemeral, load_public, load_secret, read_public


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificate(path: Path, text: str | bytes) -> Path:
    """Write a file that only its owner may read."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(0o600)
    return path


def test_a_pair_that_was_stored_is_read_again(tmp_path: Path) -> None:
    public, secret = create(tmp_path, "worker.one")
    assert (public, secret) == (tmp_path / "worker.one.key", tmp_path / "worker.one.key_secret")
    pair = load_secret(secret)
    assert zmq.curve_public(pair.secret) == pair.public
    assert load_public(public) == load_public(str(secret)) == load_public(pair.public.decode()) == pair.public
    assert load_secret(str(secret)) == pair


def test_pyzmq_reads_what_is_written_and_the_public_file_holds_no_secret(tmp_path: Path) -> None:
    public, secret = create(tmp_path, "worker")
    pair = load_secret(secret)
    assert zmq.auth.load_certificate(secret) == (pair.public, pair.secret)
    assert zmq.auth.load_certificate(public) == (pair.public, None)
    assert pair.secret not in public.read_bytes()


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_a_secret_file_is_its_owners_before_anything_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    seen: list[int] = []
    write = zmq.auth.create_certificates

    def watched(directory: str, name: str) -> tuple[str, str]:
        seen.append(mode(tmp_path / "worker.key_secret"))
        (tmp_path / "probe").touch()
        seen.append(mode(tmp_path / "probe"))  # what a file made anew would get
        return write(directory, name)

    monkeypatch.setattr(zmq.auth, "create_certificates", watched)
    before = os.umask(mask)
    try:
        public, secret = create(tmp_path, "worker")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert seen == [0o600, 0o600]
    assert mode(secret) == 0o600
    assert mode(public) == 0o666 & ~mask


@pytest.mark.parametrize("suffix", [".key", ".key_secret"])
def test_files_are_never_overwritten(tmp_path: Path, suffix: str) -> None:
    there = tmp_path / f"worker{suffix}"
    there.write_text("precious")
    with pytest.raises(SetupError, match=f"worker{suffix} exists already and is never overwritten"):
        create(tmp_path, "worker")
    assert [path.name for path in tmp_path.iterdir()] == [there.name]
    assert there.read_text() == "precious"


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "worker.key_secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match="exists already"):
        create(tmp_path, "worker")
    assert not (tmp_path / "elsewhere").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zmq.auth, "create_certificates", full)
    with pytest.raises(SetupError, match=f"cannot write keys to {tmp_path}: No space left"):
        create(tmp_path, "worker")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "/a", "../a", "a/", "a\0"])
def test_a_name_is_a_plain_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected a plain file name"):
        create(tmp_path, name)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=f"cannot write keys to {tmp_path}/none: No such file"):
        create(tmp_path / "none", "worker")


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o620, 0o610, 0o666])
def test_a_secret_that_others_can_read_is_refused(tmp_path: Path, bits: int) -> None:
    _, secret = create(tmp_path, "worker")
    secret.chmod(bits)
    with pytest.raises(SetupError, match=rf"can be read by others \(mode {bits:04o}\): run 'chmod 600'"):
        load_secret(secret)
    assert len(load_public(secret)) == 40


def test_a_public_file_is_no_secret_one(tmp_path: Path) -> None:
    public, _ = create(tmp_path, "worker")
    with pytest.raises(SetupError, match=r"worker\.key holds no secret key: give worker\.key_secret"):
        load_secret(public)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for load in (load_secret, load_public):
        with pytest.raises(SetupError, match=r"cannot read the key file .*none\.key_secret: No such file"):
            load(tmp_path / "none.key_secret")


# Always the same, as they stand in names of tests.
SECRET = z85.encode(bytes(range(32))).decode()
PUBLIC = zmq.curve_public(SECRET.encode()).decode()
OTHER = zmq.curve_keypair()[0].decode()
MALFORMED: dict[str, str | bytes] = {
    "empty": "",
    "binary": bytes(range(256)),
    "no-public": f'secret-key = "{SECRET}"\n',
    "no-value": "public-key\n",
    "short-public": f'public-key = "{PUBLIC[:-1]}"\n',
    "long-public": f'public-key = "{PUBLIC}00000"\n',
    "public-is-no-z85": f'public-key = "{PUBLIC[:-1]}~"\n',
    "public-beyond-32-bits": f'public-key = "{PUBLIC[:-5]}#####"\n',
    "secret-is-no-z85": f'public-key = "{PUBLIC}"\nsecret-key = "{SECRET[:-1]}~"\n',
    "short-secret": f'public-key = "{PUBLIC}"\nsecret-key = "{SECRET[:-1]}"\n',
    "swapped": f'public-key = "{SECRET}"\nsecret-key = "{PUBLIC}"\n',
    "of-two-pairs": f'public-key = "{OTHER}"\nsecret-key = "{SECRET}"\n',
    "huge": b'public-key = "' + bytes(1 << 20),
}


@pytest.mark.parametrize("load", [load_secret, load_public, read_public])
@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_file_is_refused_and_not_quoted(
    tmp_path: Path, text: str | bytes, load: Callable[[Path], object]
) -> None:
    file = certificate(tmp_path / "worker.key_secret", text)
    with pytest.raises(SetupError, match=r"worker\.key_secret is not a ZeroMQ certificate") as caught:
        load(file)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET[:-1] not in shown
    assert PUBLIC[:-1] not in shown


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "directory.key").mkdir()
    os.mkfifo(tmp_path / "pipe.key")
    for name in ("directory.key", "pipe.key"):
        with pytest.raises(SetupError, match=f"{name} is not a ZeroMQ certificate"):
            read_public(tmp_path / name)


@pytest.mark.parametrize("text", [SECRET, SECRET[:-1], f"{SECRET}x", SECRET.replace("0", "~"), SECRET * 20, "\0"])
def test_a_key_in_the_place_of_its_path_is_not_quoted(text: str) -> None:
    with pytest.raises(SetupError, match=r"expected NAME\.key_secret for an own key") as caught:
        load_secret(text)
    assert SECRET[:20] not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("text", ["", "x", PUBLIC[:-1], PUBLIC[:-1] + "~", "#" * 40, "é" * 40, "/no/such/file"])
def test_a_public_key_is_a_file_or_z85_of_32_bytes(text: str) -> None:
    with pytest.raises(SetupError, match="a key file does not exist"):
        load_public(text)
    with pytest.raises(ConfigError, match="expected 40 of z85"):
        check_public(text.encode())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.from_regex(r"\A[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}\Z"))
@example(PUBLIC)
def test_any_text_gives_a_key_or_a_setup_error(text: str) -> None:
    try:
        key = load_public(text)
    except SetupError:
        return
    assert key == text.encode()
    assert len(key) == 40


def test_a_pair_shows_its_public_part_only() -> None:
    pair = ephemeral()
    for shown in (repr(pair), str(pair), f"{pair}", f"{[pair]!r}"):
        assert pair.public.decode() in shown
        assert pair.secret.decode() not in shown
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(InternalError, match="must not leave its process"):
            leave(pair)


def test_ephemeral_pairs_differ() -> None:
    assert len({ephemeral().public for _ in range(8)}) == 8


@pytest.mark.parametrize(
    "pair",
    [(PUBLIC, PUBLIC), (SECRET, PUBLIC), (OTHER, SECRET), (PUBLIC, SECRET[:-1]), ("", "")],
    ids=["public-twice", "swapped", "of-two-pairs", "short", "empty"],
)
def test_two_keys_that_are_no_pair_are_refused_and_not_quoted(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="not a CURVE key pair") as caught:
        KeyPair(*(key.encode() for key in pair))
    assert SECRET[:-1] not in str(caught.value)


def test_a_libzmq_without_curve_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, secret = create(tmp_path, "worker")
    monkeypatch.setattr(zmq, "has", lambda _: False)
    for attempt in (
        lambda: create(tmp_path, "other"),
        lambda: load_secret(secret),
        lambda: load_public(public),
        lambda: load_public(PUBLIC),
        lambda: check_public(PUBLIC.encode()),
        lambda: KeyPair(PUBLIC.encode(), SECRET.encode()),
        ephemeral,
    ):
        with pytest.raises(SetupError, match="libzmq was built without CURVE"):
            attempt()
