"""Protocol 3, both ways: requests as a worker decodes them, and replies as an enclave's session takes them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence

from fuzz import framing
from tsqp.enclave.session import Session
from tsqp.errors import ProtocolError, TransportTimeoutError, TsqpError
from tsqp.transport.base import Buffer, Delivery
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyReply, AnyRequest, TensorSpec

_SPEC = TensorSpec("float32", (2, 3))
_REQUESTS, _REPLIES = 0, 1
mutated = framing.mutated


def run(data: bytes) -> None:
    """Decode one input: even kinds are requests, odd ones what a worker answers to four requests."""
    kind, found = framing.unpack(data)
    if kind % 2 == _REQUESTS:
        for message in found or [[]]:
            _decode_request(message)
    else:
        _converse(found)


def _decode_request(frames: Sequence[bytes]) -> None:
    try:
        request = codec.decode_request(frames)
    except ProtocolError:
        return
    again = codec.decode_request([messages.encode(request.header), *frames[1:]])
    if repr(again.header) != repr(request.header):
        raise AssertionError("a request that was decoded is encoded as another.")
    if sum(map(len, frames[1:])) != sum(x.numel() * x.element_size() for x in request.tensors):
        raise AssertionError("tensors are not of the size of their frames.")


class _Link:
    """A worker that says what the input says."""

    peer = "fuzz"

    def __init__(self, replies: Sequence[list[bytes]]) -> None:
        self._replies = deque(replies)

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:  # noqa: ARG002  no shared memory
        return None

    def discard(self, slot: memoryview) -> None:
        """There are no slots."""

    def send(self, frames: Sequence[Buffer]) -> None:
        """Nobody reads them."""

    def receive(self, timeout_s: float) -> Delivery:  # noqa: ARG002  it does not wait
        if not self._replies:
            raise TransportTimeoutError("it says no more.")
        return Delivery(self._replies.popleft())

    def close(self) -> None:
        """There is nothing to close."""


def _converse(replies: Sequence[list[bytes]]) -> None:
    session = Session(_Link(replies), request_timeout_s=60.0)
    session.submit(lambda i: messages.Hello(id=i, software="fuzz"))
    session.submit(lambda i: messages.Linear(id=i, group="head", x=_SPEC), [bytes(24)])
    session.submit(lambda i: messages.State(id=i))
    session.submit(lambda i: messages.Stats(id=i))
    with contextlib.suppress(TsqpError):
        session.result(4, messages.StatsResult)
    with contextlib.suppress(TsqpError):
        session.result(1, messages.Welcome)
    with contextlib.suppress(TsqpError):
        result, frames = session.result(2, messages.Result)
        y = codec.claim(result, frames, _SPEC, "fuzz").unverified()
        if codec.spec_of(y) != _SPEC:
            raise AssertionError("a claim of another shape than was asked for.")
    with contextlib.suppress(TsqpError):
        state, frames = session.result(3, messages.StateResult)
        codec.state_tensors(state, frames, "fuzz")
    session.abandon()


def seeds() -> dict[str, bytes]:
    """Return valid inputs: every request, and the answers to all four."""
    x, ids = TensorSpec("float32", (2, 3)), TensorSpec("int64", (2,))
    requests: list[tuple[AnyRequest, list[bytes]]] = [
        (messages.Hello(id=1, software="tsqp 3"), []),
        (messages.Linear(id=2, group="head", x=x), [bytes(24)]),
        (messages.LinearChain(id=3, groups=("o", "gate_up", "down", "head"), x=x), [bytes(24)]),
        (messages.LinearExact(id=4, group="head", x=TensorSpec("int32", (2, 3))), [bytes(24)]),
        (messages.Codes(id=5, group="head", first=0, rows=4), []),
        (messages.MaskProduct(id=6, group="head", seed=bytes(32), first=7, count=2), []),
        (messages.Embedding(id=7, ids=ids, dtype="float32"), [bytes(16)]),
        (messages.MatMul(id=8, a=x, b=TensorSpec("float32", (3, 1))), [bytes(24), bytes(12)]),
        (messages.State(id=9), []),
        (messages.Stats(id=10), []),
    ]
    found = {
        f"request-{type(header).__name__.lower()}": framing.pack(_REQUESTS, [[messages.encode(header), *frames]])
        for header, frames in requests
    }
    group = messages.GroupSpec("head", ("lm_head",), 3, (4,))
    replies: list[tuple[AnyReply, list[bytes]]] = [
        (
            messages.Welcome(
                id=1,
                software="tsqp 3",
                instance="1",
                serves="open",
                model="tiny",
                model_digest="d" * 64,
                device="cpu",
                dtype="float32",
                module_count=1,
                groups=(group,),
                wire_dtypes=("float32", "int8"),
            ),
            [],
        ),
        (messages.Result(id=2, y=x, compute_ns=5, started_ns=6, copy_ns=1), [bytes(24)]),
        (messages.StateResult(id=3, names=("norm", "other"), tensors=(x, ids)), [bytes(24), bytes(16)]),
        (
            messages.StatsResult(
                id=4, uptime_s=1.5, requests={"hello": 1}, errors=0, bytes_received=1, bytes_sent=2, compute_s=0.5
            ),
            [],
        ),
    ]
    encoded = [[messages.encode(reply), *frames] for reply, frames in replies]
    found["replies"] = framing.pack(_REPLIES, encoded)
    found["replies-out-of-order"] = framing.pack(_REPLIES, encoded[::-1])
    found["reply-twice"] = framing.pack(_REPLIES, [encoded[1], encoded[1]])
    found["reply-never-asked"] = framing.pack(
        _REPLIES, [[messages.encode(messages.Failure(id=9, code="input", message="x"))]]
    )
    found["failures"] = framing.pack(
        _REPLIES,
        [[messages.encode(messages.Failure(id=place, code="internal", message="x"))] for place in range(1, 5)],
    )
    found["another-version"] = framing.pack(_REQUESTS, [[messages.encode({"v": 4, "id": 1, "op": "hello"})]])
    return found
