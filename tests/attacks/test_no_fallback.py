"""Peers that offer less protection, fail, or are not what they should be: a level never becomes a weaker one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
import zmq
from attacks.watching import assert_only_words_that_may_leave
from hostile import (
    DEALER_ADDRESSES,
    MASKED,
    PROMPT,
    SETUPS,
    TARGETS,
    WORKER_ADDRESS,
    Exchange,
    HostilePeer,
    Material,
    Message,
    Rig,
    Sent,
    Tamper,
    build,
    honest,
    on,
)
from tiny_models import load_linears
from torch import Tensor

from tsqp.config import EnclaveConfig
from tsqp.enclave import connect
from tsqp.errors import (
    ConfigError,
    DeviceMemoryError,
    InputError,
    InternalError,
    ModelMismatchError,
    ProtocolError,
    TransportClosedError,
    TsqpError,
)
from tsqp.levels import Model, runnable
from tsqp.loaded import Runnable
from tsqp.transport.keys import KeyPair
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec, messages
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import OpenService


class Level:
    """``tsqp.levels`` itself over hostile peers: what a user runs, without sockets."""

    def __init__(self, material: Material, monkeypatch: pytest.MonkeyPatch, dealers: int | None) -> None:
        self.material = material
        self.dealers = dealers
        self.journal: list[Sent] = []
        self.worker = HostilePeer(WORKER_ADDRESS, material.dispatcher(), self.journal)
        self.helpers = [
            HostilePeer(address, material.dispatcher("masks"), self.journal)
            for address in DEALER_ADDRESSES[: dealers or 0]
        ]
        places = {parse(peer.address): peer for peer in (self.worker, *self.helpers)}

        def open_link(endpoint: Endpoint, _limit: int, _key: bytes | None, _own: KeyPair | None) -> object:
            return places[endpoint].link()

        monkeypatch.setattr(connect, "open_client", open_link)

    @contextmanager
    def opened(self) -> Iterator[Runnable]:
        model = Model(self.material.directory, self.material.packed.config, None, self.material.packed)
        config = EnclaveConfig(
            worker=WORKER_ADDRESS,
            insecure="on",
            dealers=tuple(helper.address for helper in self.helpers),
            dealer_keys=tuple(zmq.curve_keypair()[0].decode() for _ in self.helpers),
            connect_timeout_s=1.0,
            request_timeout_s=1.0,
        )
        with runnable("verified" if self.dealers is None else "masked", model, config) as loaded:
            yield loaded

    def run(self) -> Tensor:
        with self.opened() as loaded:
            assert loaded.predict_all is not None
            return loaded.predict_all(PROMPT)

    @property
    def operations(self) -> set[str]:
        return {type(sent.header).__name__ for sent in self.journal}


@pytest.fixture(params=SETUPS)
def level(request: pytest.FixtureRequest, material: Material, monkeypatch: pytest.MonkeyPatch) -> Level:
    return Level(material, monkeypatch, SETUPS[request.param])


def greeting(**changes: object) -> Tamper:
    """Change what a peer says of itself."""

    def tampered(exchange: Exchange) -> list[Message]:
        if not isinstance(exchange.request, messages.Hello):
            return [exchange.reply]
        welcome = codec.decode_reply(exchange.reply)[0]
        return [[messages.encode(msgspec.structs.replace(welcome, **changes))]]

    return tampered


def test_levels_over_honest_peers_are_exact(level: Level, local_logits: Tensor) -> None:
    """The control: nothing below fails for want of a working set-up."""
    assert torch.equal(level.run(), local_logits)


@pytest.mark.parametrize("serves", ["open", "masks"])
def test_a_worker_that_says_it_serves_something_else_is_refused(level: Level, serves: str) -> None:
    level.worker.tamper = greeting(serves=serves)
    with pytest.raises(ModelMismatchError, match=WORKER_ADDRESS):
        level.run()
    assert level.operations == {"Hello"}


def test_a_worker_of_the_level_open_is_refused(level: Level, checkpoint: Path) -> None:
    linears = load_linears(checkpoint)
    level.worker.dispatcher = Dispatcher(OpenService(linears, {}), "tiny", level.material.digest)
    with pytest.raises(ModelMismatchError, match="serves float weights"):
        level.run()
    assert level.operations == {"Hello"}


def test_a_worker_of_the_level_open_that_poses_as_exact_gets_no_activation(level: Level, checkpoint: Path) -> None:
    """It fails at the codes, before it is sent a single product."""
    linears = load_linears(checkpoint)
    level.worker.dispatcher = Dispatcher(OpenService(linears, {}), "tiny", level.material.digest)
    level.worker.tamper = greeting(serves="exact", dtype="int8")
    with pytest.raises(InputError, match="Codes request"):
        level.run()
    assert level.operations <= {"Hello", "Codes"}


def test_a_worker_that_is_a_dealer_is_refused(level: Level) -> None:
    level.worker.dispatcher = level.material.dispatcher("masks")
    with pytest.raises(ModelMismatchError, match="serves mask products"):
        level.run()
    assert level.operations == {"Hello"}


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32"}, {"model_digest": "0" * 64}, {"groups": ()}], ids=["dtype", "digest", "groups"]
)
def test_a_worker_of_another_model_is_refused(level: Level, changes: dict[str, object]) -> None:
    level.worker.tamper = greeting(**changes)
    with pytest.raises(ModelMismatchError, match=WORKER_ADDRESS):
        level.run()
    assert level.operations == {"Hello"}


@pytest.mark.parametrize("reply", [messages.Failure(id=1, code="input", message="no"), messages.Result], ids=str)
def test_a_worker_without_a_greeting_is_refused(level: Level, reply: object) -> None:
    def tampered(exchange: Exchange) -> list[Message]:
        answer = (
            reply
            if isinstance(reply, messages.Failure)
            else messages.Result(id=1, y=messages.TensorSpec("int8", (0,)), compute_ns=0)
        )
        return [[messages.encode(answer)] if isinstance(exchange.request, messages.Hello) else exchange.reply]

    level.worker.tamper = tampered
    with pytest.raises((InputError, ProtocolError)):
        level.run()
    assert level.operations == {"Hello"}


@pytest.mark.parametrize("dealers", [1, 2])
def test_a_dealer_that_is_a_worker_is_sent_no_seed(
    material: Material, monkeypatch: pytest.MonkeyPatch, dealers: int
) -> None:
    level = Level(material, monkeypatch, dealers)
    level.helpers[-1].dispatcher = material.dispatcher("exact")
    with pytest.raises(ModelMismatchError, match=level.helpers[-1].address):
        level.run()
    assert "MaskProduct" not in level.operations
    assert "LinearExact" not in level.operations


@pytest.mark.parametrize("serves", ["open", "exact"])
def test_a_dealer_that_says_it_serves_something_else_is_sent_no_seed(
    material: Material, monkeypatch: pytest.MonkeyPatch, serves: str
) -> None:
    level = Level(material, monkeypatch, 2)
    level.helpers[0].tamper = greeting(serves=serves)
    with pytest.raises(ModelMismatchError, match=level.helpers[0].address):
        level.run()
    assert "MaskProduct" not in level.operations


@pytest.mark.parametrize("who", ["the worker", "the other dealer"])
def test_a_dealer_in_the_same_process_as_another_peer_is_sent_no_seed(
    material: Material, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Two addresses of one process, which would see a mask and what it hides, or both masks."""
    level = Level(material, monkeypatch, 2)
    same = greeting(instance="the same")
    level.helpers[1].tamper = same
    (level.worker if who == "the worker" else level.helpers[0]).tamper = same
    with pytest.raises(ConfigError, match="same process"):
        level.run()
    assert "MaskProduct" not in level.operations


def test_a_worker_that_changes_while_reconnecting_is_sent_nothing(level: Level) -> None:
    """The link fails, and what answers there afterwards serves floats."""

    def fail_once(exchange: Exchange) -> list[Message | TransportClosedError]:
        level.worker.tamper = greeting(serves="open", dtype="float32")
        return [TransportClosedError(f"the worker at {exchange.peer.address} closed the connection or died.")]

    level.worker.tamper = on("layers.1.down", fail_once)
    with pytest.raises(ModelMismatchError):
        level.run()
    assert isinstance(level.worker.received[-1].header, messages.Hello)
    assert level.operations <= {"Hello", "Codes", "MaskProduct", "LinearExact"}


FAILURES = {"input": InputError, "memory": DeviceMemoryError, "internal": InternalError, "protocol": ProtocolError}


def prefill_times(count: int, rig: Rig) -> None:
    """Run often enough to use up the pool."""
    for _ in range(count):
        rig.prefill(PROMPT)


def failing(code: str) -> Tamper:
    message = "send it as float32 in clear instead"
    return lambda exchange: [
        [messages.encode(messages.Failure(id=exchange.request.id, code=code, message=message))]  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("code", FAILURES)
def test_a_failing_worker_is_not_asked_in_another_way(rig: Rig, target: str, code: str) -> None:
    rig.worker.tamper = on(target, failing(code))
    with pytest.raises(FAILURES[code], match=target):
        rig.prefill(PROMPT)
    assert rig.journal[-1].group == target
    assert all(group != target for group, _ in rig.outputs)
    assert_only_words_that_may_leave(rig)


@pytest.mark.parametrize("code", FAILURES)
@pytest.mark.parametrize("dealers", [1, 2])
def test_a_failing_dealer_leaves_nothing_unmasked(material: Material, dealers: int, code: str) -> None:
    rig = build(material, dealers)
    rig.dealers[-1].tamper = on("layers.1.down", failing(code))
    with pytest.raises(FAILURES[code], match=r"layers\.1\.down"):
        rig.prefill(PROMPT)
    assert all(group != "layers.1.down" for group, _ in rig.worker.tensors)
    assert_only_words_that_may_leave(rig)


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_words_stay_masked_after_every_kind_of_failure(material: Material, dealers: int) -> None:
    """An enclave that has seen failures goes on as before: what it sends afterwards is masked too."""
    rig = build(material, dealers, pool_rows=8)
    for code in FAILURES:
        for peer in rig.peers[1:] or rig.peers:
            peer.tamper = on("layers.1.down", failing(code))
            with pytest.raises(TsqpError):
                prefill_times(3, rig)
            peer.tamper = honest
    assert_only_words_that_may_leave(rig)
