"""A session against a worker that answers late, out of order, wrongly, or with malice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_link import PlainLink

from tsqp.enclave.session import MAX_IN_FLIGHT, Expected, Session, check_peer
from tsqp.errors import (
    BusyError,
    DeviceMemoryError,
    HostileError,
    InputError,
    InternalError,
    ModelMismatchError,
    ProtocolError,
    TransportClosedError,
    TransportTimeoutError,
    TsqpError,
)
from tsqp.model.architecture import LlamaConfig, RopeParameters, linear_groups
from tsqp.transport.base import Buffer, Delivery
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyReply, AnyRequest, GroupSpec, TensorSpec

SPEC = TensorSpec("float32", (2,))
FRAME = bytes(8)
CONFIG = LlamaConfig(
    hidden_size=8,
    intermediate_size=12,
    layers=2,
    heads=2,
    kv_heads=1,
    head_size=4,
    vocab_size=32,
    context_length=64,
    rms_norm_eps=1e-5,
    rope=RopeParameters(),
)


class FakeTransport(PlainLink):
    """A worker in memory: ``inbox`` is what it will say, ``sent`` what it was told."""

    peer = "gpu.example:50051"

    def __init__(self) -> None:
        self.sent: list[list[Buffer]] = []
        self.inbox: list[list[bytes]] = []
        self.timeouts_s: list[float] = []
        self.closed = 0
        self.gone = False

    def send(self, frames: Sequence[Buffer]) -> None:
        self.sent.append(list(frames))

    def receive(self, timeout_s: float) -> Delivery:
        self.timeouts_s.append(timeout_s)
        if self.gone:
            raise TransportClosedError(f"the worker at {self.peer} closed the connection or died.")
        if not self.inbox:
            raise TransportTimeoutError(f"{self.peer} did not answer within {timeout_s:g} s.")
        return Delivery(self.inbox.pop(0))

    def close(self) -> None:
        self.closed += 1

    def say(self, reply: AnyReply | dict[str, Any], *frames: bytes) -> None:
        self.inbox.append([msgspec.msgpack.encode(reply), *frames])


@pytest.fixture
def worker() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def session(worker: FakeTransport) -> Session:
    return Session(worker, request_timeout_s=30.0)


def linear(request_id: int) -> AnyRequest:
    return messages.Linear(id=request_id, group="head", x=SPEC)


def result(request_id: int, spec: TensorSpec = SPEC) -> messages.Result:
    return messages.Result(id=request_id, y=spec, compute_ns=11, copy_ns=4)


EXPECTED = Expected(serves="open", digest="d" * 64, dtype="float32", groups=linear_groups(CONFIG))


def welcome(**changes: Any) -> messages.Welcome:
    groups = tuple(GroupSpec(g.name, g.members, g.in_features, g.out_features) for g in linear_groups(CONFIG))
    fields: dict[str, Any] = {
        "id": 1,
        "software": "tsqp 3",
        "instance": "1",
        "serves": "open",
        "model": "tiny",
        "model_digest": "d" * 64,
        "device": "cpu",
        "dtype": "float32",
        "module_count": 16,
        "groups": groups,
    }
    return messages.Welcome(**fields | changes)


def test_a_request_is_sent_and_its_reply_returned(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(linear, [FRAME], "linear head")
    worker.say(result(request_id), FRAME)
    reply, frames = session.result(request_id, messages.Result)
    assert reply == result(request_id)
    assert [bytes(frame) for frame in frames] == [FRAME]
    assert codec.decode_request(worker.sent[0]).header == linear(request_id)


def test_the_meter_counts_bytes_round_trips_and_the_workers_time(session: Session, worker: FakeTransport) -> None:
    for _ in range(2):
        request_id = session.submit(linear, [FRAME])
        worker.say(result(request_id), FRAME)
        session.result(request_id, messages.Result)
    header, reply = len(messages.encode(linear(1))), len(messages.encode(result(1)))
    assert session.meter.round_trips == 2
    assert session.meter.bytes_sent == 2 * (header + 8)
    assert session.meter.bytes_received == 2 * (reply + 8)
    assert (session.meter.compute_ns, session.meter.copy_ns) == (22, 8)
    assert session.meter.waited_ns > 0


@settings(deadline=None)
@given(order=st.permutations(range(1, 9)), asked=st.permutations(range(1, 9)))
def test_replies_in_any_order_reach_their_own_requests(order: list[int], asked: list[int]) -> None:
    worker = FakeTransport()
    session = Session(worker, 30.0)
    assert [session.submit(linear) for _ in order] == list(range(1, 9))
    for request_id in order:
        worker.say(result(request_id), bytes([request_id]) * 8)
    for request_id in asked:
        reply, frames = session.result(request_id, messages.Result)
        assert (reply.id, bytes(frames[0])) == (request_id, bytes([request_id]) * 8)


def test_the_in_flight_limit_holds_until_a_result_is_collected(session: Session, worker: FakeTransport) -> None:
    ids = [session.submit(linear) for _ in range(MAX_IN_FLIGHT)]
    with pytest.raises(InputError, match=rf"{MAX_IN_FLIGHT} requests to gpu.example:50051 are in flight"):
        session.submit(linear)
    assert len(worker.sent) == MAX_IN_FLIGHT
    for request_id in reversed(ids):
        worker.say(result(request_id), FRAME)
    session.result(ids[0], messages.Result)
    assert session.submit(linear) == ids[-1] + 1


def expect_protocol_error(session: Session, request_id: int, match: str) -> None:
    with pytest.raises(ProtocolError, match=match):
        session.result(request_id, messages.Result)


@pytest.mark.parametrize("other", [0, 2, 999, (1 << 62) - 1])
def test_a_reply_to_a_request_never_made_is_refused(session: Session, worker: FakeTransport, other: int) -> None:
    request_id = session.submit(linear)
    worker.say(result(other), FRAME)
    expect_protocol_error(session, request_id, "gpu.example:50051 answered a request that is not in flight")


def test_a_second_reply_to_one_request_is_refused(session: Session, worker: FakeTransport) -> None:
    first, second = session.submit(linear), session.submit(linear)
    worker.say(result(first), FRAME)
    worker.say(result(first), bytes([9]) * 8)
    expect_protocol_error(session, second, "not in flight")
    assert bytes(session.result(first, messages.Result)[1][0]) == FRAME


def test_a_reply_to_a_request_already_answered_is_refused(session: Session, worker: FakeTransport) -> None:
    first = session.submit(linear)
    worker.say(result(first), FRAME)
    session.result(first, messages.Result)
    second = session.submit(linear)
    worker.say(result(first), FRAME)
    expect_protocol_error(session, second, "not in flight")


@pytest.mark.parametrize(
    "reply",
    [
        messages.StateResult(id=1, names=(), tensors=()),
        messages.StatsResult(id=1, uptime_s=1.0, requests={}, errors=0, bytes_received=0, bytes_sent=0, compute_s=0.0),
        welcome(),
    ],
)
def test_a_reply_of_another_kind_is_refused(session: Session, worker: FakeTransport, reply: AnyReply) -> None:
    request_id = session.submit(linear, operation="linear head")
    worker.say(reply)
    expect_protocol_error(
        session, request_id, rf"linear head at gpu.* expected a reply of type Result, got {type(reply).__name__}"
    )


@pytest.mark.parametrize("message", [[], [b""], [b"junk"], [messages.encode(linear(1))]])
def test_what_is_no_reply_is_refused(session: Session, worker: FakeTransport, message: list[bytes]) -> None:
    request_id = session.submit(linear)
    worker.inbox.append(message)
    expect_protocol_error(session, request_id, "a reply without a header|not a valid message from the worker")


@settings(deadline=None)
@given(replies=st.lists(st.lists(st.binary(max_size=48), max_size=3), max_size=3))
def test_any_bytes_from_a_worker_end_in_an_error_of_ours(replies: list[list[bytes]]) -> None:
    worker = FakeTransport()
    session = Session(worker, 30.0)
    worker.inbox = replies
    with pytest.raises(TsqpError):
        session.result(session.submit(linear), messages.Result)


def test_tensors_beside_a_reply_that_has_none_are_refused(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(lambda i: messages.Hello(id=i, software="test"))
    worker.say(welcome(id=request_id), FRAME)
    with pytest.raises(ProtocolError, match="carries no tensors, 1 came"):
        session.result(request_id, messages.Welcome)


def test_a_result_of_very_many_frames_is_refused(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(linear)
    worker.say(result(request_id), *[FRAME] * 100_000)
    reply, frames = session.result(request_id, messages.Result)
    with pytest.raises(ProtocolError, match="expected one tensor frame, 100000 came"):
        codec.claim(reply, frames, SPEC, "linear head")


def test_a_state_of_more_frames_than_names_is_refused(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(lambda i: messages.State(id=i))
    worker.say(messages.StateResult(id=request_id, names=("norm",), tensors=(SPEC,)), *[FRAME] * 100_000)
    reply, frames = session.result(request_id, messages.StateResult)
    with pytest.raises(ProtocolError, match="1 names, 1 specs and 100000 frames do not match"):
        codec.state_tensors(reply, frames, "state")


def test_an_abandoned_request_is_answered_once(session: Session, worker: FakeTransport) -> None:
    """Its answer is dropped; a second one is a reply to nothing, and its id is not used again."""
    abandoned = session.submit(linear)
    session.abandon()
    request_id = session.submit(linear)
    assert request_id != abandoned
    worker.say(result(abandoned), FRAME)
    worker.say(result(request_id), FRAME)
    assert session.result(request_id, messages.Result)[0].id == request_id
    second = session.submit(linear)
    worker.say(result(abandoned), FRAME)
    expect_protocol_error(session, second, "not in flight")


def test_one_request_is_abandoned_and_others_are_not(session: Session, worker: FakeTransport) -> None:
    gone, arrived, kept = (session.submit(linear) for _ in range(3))
    worker.say(result(arrived), FRAME)
    worker.say(result(kept), FRAME)
    session.result(kept, messages.Result)
    session.abandon([gone, arrived, kept])
    worker.say(result(gone), FRAME)
    last = session.submit(linear)
    worker.say(result(last), FRAME)
    assert session.result(last, messages.Result)[0].id == last
    for request_id in (gone, arrived):
        with pytest.raises(InternalError, match="never made, or its result has been taken"):
            session.result(request_id, messages.Result)
    worker.say(result(arrived), FRAME)
    expect_protocol_error(session, session.submit(linear), "not in flight")


def test_a_result_can_be_taken_once(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(linear, [FRAME])
    worker.say(result(request_id), FRAME)
    session.result(request_id, messages.Result)
    with pytest.raises(InternalError, match="never made, or its result has been taken"):
        session.result(request_id, messages.Result)


@pytest.mark.parametrize(("version", "side"), [(2, "the worker"), (1, "the worker"), (4, "this side")])
def test_another_protocol_version_names_both_and_which_side_to_upgrade(
    session: Session, worker: FakeTransport, version: int, side: str
) -> None:
    worker.say({"v": version, "id": 1, "kind": "welcome", "field_of_another_version": [1]})
    with pytest.raises(ProtocolError, match=rf"worker speaks .* {version}, this side speaks 3: upgrade {side}\."):
        session.hello(5.0)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("memory", DeviceMemoryError),
        ("input", InputError),
        ("protocol", ProtocolError),
        ("version", ProtocolError),
        ("internal", InternalError),
    ],
)
def test_a_failure_becomes_the_error_that_says_what_to_do(
    session: Session, worker: FakeTransport, code: messages.ErrorCode, kind: type[TsqpError]
) -> None:
    request_id = session.submit(linear, operation="linear layers.3.o")
    worker.say(messages.Failure(id=request_id, code=code, message="no room for it"))
    with pytest.raises(kind, match=r"linear layers\.3\.o failed at the worker gpu.example:50051: no room") as caught:
        session.result(request_id, messages.Result)
    assert type(caught.value) is kind
    assert isinstance(caught.value, HostileError) == (kind is ProtocolError)


def test_a_failure_cannot_write_control_characters_to_a_terminal(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(linear)
    worker.say(messages.Failure(id=request_id, code="input", message="\x1b[2J\r\nall is well\x07"))
    with pytest.raises(InputError) as caught:
        session.result(request_id, messages.Result)
    assert str(caught.value).isprintable()


def test_a_failure_of_one_request_leaves_the_others(session: Session, worker: FakeTransport) -> None:
    first, second = session.submit(linear), session.submit(linear)
    worker.say(messages.Failure(id=first, code="input", message="odd"))
    worker.say(result(second), FRAME)
    assert session.result(second, messages.Result)[0].id == second
    with pytest.raises(InputError):
        session.result(first, messages.Result)


def busy(request_id: int) -> messages.Failure:
    return messages.Failure(id=request_id, code="busy", message="too many requests.")


class BusyTransport(FakeTransport):
    """Refuses each request so often."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.left: dict[int, int] = {}
        self.refusals = refusals

    def send(self, frames: Sequence[Buffer]) -> None:
        super().send(frames)
        request_id = msgspec.msgpack.decode(frames[0])["id"]
        self.left[request_id] = self.left.get(request_id, self.refusals) - 1
        if self.left[request_id] < 0:
            self.say(result(request_id), FRAME)
        else:
            self.say(busy(request_id))


def test_what_a_busy_worker_refuses_is_sent_again_as_it_was() -> None:
    worker = BusyTransport(refusals=2)
    session = Session(worker, 60.0)
    frames = [bytes([number] * 8) for number in range(2)]
    asked = [session.submit(linear, [frame]) for frame in frames]
    for request_id in asked:
        assert session.result(request_id, messages.Result)[0].id == request_id
    for message in worker.sent[:2]:
        assert worker.sent.count(message) == 3
    assert [message[1] for message in worker.sent[:2]] == frames
    assert len(worker.sent) == 6


def test_a_worker_that_stays_busy_is_named_when_the_time_is_over(worker: FakeTransport) -> None:
    session = Session(worker, request_timeout_s=0.05)
    request_id = session.submit(linear, [FRAME], "linear layers.0.qkv")
    worker.say(busy(request_id))
    with pytest.raises(
        BusyError, match=r"linear layers\.0\.qkv: the worker at gpu\.example:50051 is busy: too many req"
    ):
        session.result(request_id, messages.Result)
    assert len(worker.sent) > 1
    assert all(message == worker.sent[0] for message in worker.sent)


def test_no_reply_to_what_was_refused_and_given_up_is_expected(session: Session, worker: FakeTransport) -> None:
    first, second = session.submit(linear, [FRAME]), session.submit(linear, [FRAME])
    worker.say(busy(first))
    worker.say(result(second), FRAME)
    session.result(second, messages.Result)
    session.abandon()
    worker.say(result(first), FRAME)
    third = session.submit(linear, [FRAME])
    expect_protocol_error(session, third, "not in flight")


def test_a_timeout_names_operation_peer_and_seconds(session: Session, worker: FakeTransport) -> None:
    request_id = session.submit(linear, operation="linear head")
    with pytest.raises(
        TransportTimeoutError, match=r"linear head: the worker at gpu.example:50051 .* within 30 s .*TSQP_REQUEST_TIME"
    ):
        session.result(request_id, messages.Result)
    with pytest.raises(TransportTimeoutError, match=r"within 0\.25 s"):
        session.result(request_id, messages.Result, timeout_s=0.25)
    assert worker.timeouts_s[0] <= 30
    assert worker.timeouts_s[1] <= 0.25


def test_other_replies_do_not_prolong_the_wait(
    session: Session, worker: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every look at the clock takes ten seconds.
    ticks = iter(range(0, 10**13, 10 * 10**9))
    monkeypatch.setattr("time.monotonic_ns", lambda: next(ticks))
    ids = [session.submit(linear) for _ in range(5)]
    for request_id in ids[1:]:
        worker.say(result(request_id), FRAME)
    with pytest.raises(TransportTimeoutError):
        session.result(ids[0], messages.Result)
    assert worker.timeouts_s == [20, 10, 0, 0, 0]


def test_nobody_there_names_host_port_and_seconds(session: Session) -> None:
    with pytest.raises(
        TransportTimeoutError, match=r"no TSQP worker answered at gpu.example:50051 within 1.5 s.*tsqp worker"
    ):
        session.hello(1.5)


def test_a_worker_that_is_gone_is_reported_as_such(session: Session, worker: FakeTransport) -> None:
    worker.gone = True
    with pytest.raises(TransportClosedError, match=r"gpu\.example:50051 closed the connection"):
        session.result(session.submit(linear), messages.Result)


def test_close_closes_the_transport(session: Session, worker: FakeTransport) -> None:
    session.close()
    assert worker.closed == 1


def test_the_right_worker_is_accepted(session: Session, worker: FakeTransport) -> None:
    worker.say(welcome())
    check_peer(session.hello(5.0), EXPECTED, session.peer)


def other_group(change: Callable[[GroupSpec], GroupSpec]) -> tuple[GroupSpec, ...]:
    first, *rest = welcome().groups
    return (change(first), *rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"serves": "exact"}, r"serves int8 codes.*needs float weights.*'tsqp worker'"),
        ({"serves": "masks"}, "serves mask products; this side needs float weights"),
        ({"model_digest": "e" * 64}, r"holds model 'tiny' \(digest e{12}\).*expects digest d{12}"),
        ({"dtype": "float16"}, r"computes in float16, this side asks for float32.*--dtype"),
        ({"groups": ()}, "other linear groups"),
        ({"groups": welcome().groups[::-1]}, "other linear groups"),
        ({"groups": other_group(lambda g: msgspec.structs.replace(g, in_features=9))}, "other linear groups"),
        ({"groups": other_group(lambda g: msgspec.structs.replace(g, out_features=(8, 4, 5)))}, "other linear groups"),
        ({"groups": other_group(lambda g: msgspec.structs.replace(g, name="x"))}, "other linear groups"),
    ],
)
def test_another_model_or_dtype_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelMismatchError, match=message):
        check_peer(welcome(**changes), EXPECTED, "gpu.example:50051")


class SlotTransport(FakeTransport):
    """A link with slots; ``held`` are those that are neither sent nor given back, or still kept."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, memoryview] = {}
        self.kept: set[int] = set()

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        slot = memoryview(bytearray(size))
        self.held[id(slot)] = slot
        if kept:
            self.kept.add(id(slot))
        return slot

    def discard(self, slot: memoryview) -> None:
        self.held.pop(id(slot), None)

    def send(self, frames: Sequence[Buffer]) -> None:
        if self.gone:
            raise TransportClosedError(f"the worker at {self.peer} closed the connection or died.")
        super().send(frames)
        for frame in frames:
            if id(frame) not in self.kept:
                self.held.pop(id(frame), None)


@pytest.fixture
def slots() -> SlotTransport:
    return SlotTransport()


def failing(request_id: int) -> AnyRequest:
    raise ValueError(request_id)


def unencodable(request_id: int) -> AnyRequest:
    return messages.Linear(id=request_id, group=object(), x=SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("make", [failing, unencodable])
def test_a_request_that_cannot_be_made_gives_its_slots_back(
    slots: SlotTransport,
    make: Callable[[int], AnyRequest],
    kept: bool,  # noqa: FBT001
) -> None:
    session = Session(slots, 30.0)
    _, frame = session.room(SPEC, kept=kept)
    with pytest.raises((ValueError, TypeError)):
        session.submit(make, [frame])
    assert not slots.held


def test_a_request_too_many_gives_its_slots_back(slots: SlotTransport) -> None:
    session = Session(slots, 30.0)
    for _ in range(MAX_IN_FLIGHT):
        session.submit(linear)
    frame = session.framed(torch.ones(2), torch.float32)
    with pytest.raises(InputError, match="in flight already"):
        session.submit(linear, [FRAME, frame])
    assert not slots.held


def test_a_request_that_does_not_leave_gives_its_slots_back(slots: SlotTransport) -> None:
    session = Session(slots, 30.0)
    _, frame = session.room(SPEC, kept=True)
    slots.gone = True
    with pytest.raises(TransportClosedError):
        session.submit(linear, [frame])
    assert not slots.held


def test_a_tensor_that_cannot_be_copied_gives_its_slot_back(slots: SlotTransport) -> None:
    session = Session(slots, 30.0)
    with pytest.raises(NotImplementedError):
        session.framed(torch.ones(2, device="meta"), torch.float32)
    assert not slots.held


def test_a_slot_is_kept_until_the_reply_is_taken(slots: SlotTransport) -> None:
    session = Session(slots, 30.0)
    frames = [session.room(SPEC, kept=True)[1] for _ in range(2)]
    first, second = (session.submit(linear, [frame]) for frame in frames)
    slots.say(result(second), FRAME)
    slots.say(result(first), FRAME)
    session.result(first, messages.Result)
    assert list(slots.held.values()) == [frames[1]]
    session.result(second, messages.Result)
    assert not slots.held


def test_a_slot_is_given_up_with_a_failure_or_an_abandoned_request(slots: SlotTransport) -> None:
    session = Session(slots, 30.0)
    frames = [session.room(SPEC, kept=True)[1] for _ in range(3)]
    ids = [session.submit(linear, [frame]) for frame in frames]
    slots.say(messages.Failure(id=ids[0], code="input", message="no"))
    with pytest.raises(InputError):
        session.result(ids[0], messages.Result)
    assert len(slots.held) == 2
    session.abandon()
    assert not slots.held


def test_slots_are_not_sent_again() -> None:
    """What is sent is no longer this side's."""
    worker = SlotTransport()
    session = Session(worker, 60.0)
    _, frame = session.room(SPEC)
    request_id = session.submit(linear, [frame])
    worker.say(busy(request_id))
    with pytest.raises(BusyError, match="too many requests"):
        session.result(request_id, messages.Result)
    assert len(worker.sent) == 1
