"""Dealers that would see both a mask and what it hides are refused, by address, key and process."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from workers import packed_tiny, running_worker

from tsqp import tee
from tsqp.config import EnclaveConfig
from tsqp.enclave.connect import Peer
from tsqp.enclave.dealers import check_dealers, dealer_peers
from tsqp.errors import ConfigError, ModelMismatchError
from tsqp.levels import open_model, runnable

KEYS = [zmq.curve_keypair()[0] for _ in range(3)]
WORKER = Peer(address="gpu.example:50051", key=KEYS[0])


def refuse(_notice: str) -> None:
    pytest.fail("nothing should be let pass with a notice")


def ignored(_notice: str) -> None:
    """Take notices that are not what a test is about: of links in clear, and of slower twins (TSQP_NATIVE=off)."""


def test_distinct_dealers_with_keys_pass_silently() -> None:
    check_dealers(WORKER, (Peer(address="a.example:1", key=KEYS[1]), Peer(address="b.example:1", key=KEYS[2])), refuse)


@pytest.mark.parametrize(
    ("addresses", "keys", "message"),
    [
        (["gpu.example:50051"], [1], "same address as the worker"),
        (["tcp://gpu.example:50051"], [1], "same address as the worker"),
        (["other.example:1"], [0], "same key as the worker"),
        (["a.example:1", "a.example:1"], [1, 2], "same address as dealer a.example:1"),
        (["a.example:1", "b.example:1"], [1, 1], "same key as dealer a.example:1"),
        (["shm:///run/dealer"], [1], "must not lie in shared memory"),
    ],
)
def test_a_dealer_that_would_see_both_parts_is_refused(addresses: list[str], keys: list[int], message: str) -> None:
    peers = tuple(Peer(address=address, key=KEYS[key]) for address, key in zip(addresses, keys, strict=True))
    with pytest.raises(ConfigError, match=message):
        check_dealers(WORKER, peers, refuse)


def test_localhost_and_its_address_are_one() -> None:
    with pytest.raises(ConfigError, match="same address"):
        check_dealers(Peer(address="localhost:7"), (Peer(address="127.0.0.1:7", key=KEYS[1]),), refuse)


def test_a_link_in_clear_warns_outside_of_a_tee_and_is_refused_in_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notices: list[str] = []
    clear = (Peer(address="127.0.0.1:2"),)
    monkeypatch.setattr(tee, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(tee, "_GRAMINE_TYPE", tmp_path / "no")
    monkeypatch.setattr(tee, "_TDX_GUEST", tmp_path / "neither")
    check_dealers(WORKER, clear, notices.append)
    assert "development only" in notices[0]
    for path, name in (("_GRAMINE_TYPE", "SGX"), ("_TDX_GUEST", "TDX")):
        monkeypatch.setattr(tee, path, tmp_path)
        with pytest.raises(ConfigError, match=f"inside {name} seeds travel encrypted only"):
            check_dealers(WORKER, clear, refuse)
        monkeypatch.setattr(tee, path, tmp_path / "no")
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu tdx_guest sse\n")
    with pytest.raises(ConfigError, match="inside TDX seeds travel encrypted only"):
        check_dealers(WORKER, clear, refuse)


def test_a_dealer_elsewhere_needs_a_key_even_while_developing() -> None:
    with pytest.raises(ConfigError, match="is not on this machine and has no key: give --dealer-key"):
        check_dealers(WORKER, (Peer(address="dealer.example:2"),), refuse)


def test_there_is_a_key_for_every_dealer_or_for_none() -> None:
    config = EnclaveConfig(dealers=("a.example:1", "b.example:1"), dealer_keys=("k",))
    with pytest.raises(ConfigError, match="2 dealers and 1 dealer keys"):
        dealer_peers(config, str.encode)
    assert dealer_peers(EnclaveConfig(dealers=("a.example:1",)), str.encode) == (Peer(address="a.example:1"),)
    assert [peer.key for peer in dealer_peers(EnclaveConfig(dealers=("a:1",), dealer_keys=("k",)), str.encode)] == [
        b"k"
    ]


def test_two_addresses_of_one_dealer_process_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    model = open_model(str(packed), "masked")
    second = f"ipc://{tmp_path}/second"
    with (
        running_worker(packed) as worker,
        running_worker(packed, "ipc", command="dealer", listen=second) as dealer,
    ):
        config = EnclaveConfig(worker=worker, dealers=(dealer, second))
        refusal = pytest.raises(ConfigError, match=f"dealer {second} has the same process as dealer {dealer}")
        with refusal, runnable("masked", model, config, on_notice=ignored):
            pass


def test_a_worker_is_no_dealer_and_a_dealer_no_worker(tiny_llama: Path, tmp_path: Path) -> None:
    packed = packed_tiny(tiny_llama, tmp_path / "packed")
    model = open_model(str(packed), "masked")
    with running_worker(packed, "ipc") as first, running_worker(packed, "ipc") as second:
        config = EnclaveConfig(worker=first, dealers=(second,))
        refusal = pytest.raises(ModelMismatchError, match="needs mask products: start it with 'tsqp dealer'")
        with refusal, runnable("masked", model, config, on_notice=ignored):
            pass
    refusal = pytest.raises(ModelMismatchError, match="serves mask products; this side needs int8 codes")
    with running_worker(packed, "ipc", command="dealer") as dealer:
        config = EnclaveConfig(worker=dealer)
        with refusal, runnable("verified", model, config, on_notice=ignored):
            pass
