"""One enclave's conversation with one worker: who it is, requests in flight, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from tsqp import __version__
from tsqp.enclave.refusals import Refusals
from tsqp.errors import (
    BusyError,
    DeviceMemoryError,
    InputError,
    InternalError,
    ModelMismatchError,
    ProtocolError,
    TransportTimeoutError,
    printable,
)
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup
from tsqp.transport.base import Buffer, ClientTransport, Delivery
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyReply, AnyRequest, Failure, TensorSpec

ReplyType = TypeVar("ReplyType", messages.Welcome, messages.Result, messages.StateResult, messages.StatsResult)

Role = Literal["worker", "dealer"]

MAX_IN_FLIGHT = 1024
_START = {"worker": "'tsqp worker' (or tee_gpu/server.py)", "dealer": "'tsqp dealer'"}


class Session:
    """Sends requests to a worker and matches replies to them. Not thread-safe.

    Args:
        transport: the link; the session owns and closes it.
        request_timeout_s: how long to wait for any one reply.
        meter: where costs are counted; its own by default.
        role: what the peer is called in messages.
    """

    def __init__(
        self, transport: ClientTransport, request_timeout_s: float, meter: Meter | None = None, role: Role = "worker"
    ) -> None:
        self._role = role
        self._transport = transport
        self._timeout_s = request_timeout_s
        self._next_id = 1
        self._waiting: dict[int, str] = {}
        # What those requests sent: slots that are kept are given back when the reply is taken.
        self._frames: dict[int, Sequence[Buffer]] = {}
        # And their headers: what a busy worker refuses is sent again as it was.
        self._headers: dict[int, bytes] = {}
        self._refusals = Refusals()
        # Whether frames may be slots, which end when they are sent.
        self._has_slots = False
        self._arrived: dict[int, tuple[AnyReply, Delivery]] = {}
        self._abandoned: set[int] = set()
        self.meter = meter or Meter()

    @property
    def peer(self) -> str:
        """The worker's address, for messages."""
        return self._transport.peer

    def room(self, spec: TensorSpec, *, kept: bool = False) -> tuple[Tensor, memoryview]:
        """Return a tensor to write, once, and the frame to submit for it.

        It lies in memory shared with the worker where there is such memory and room in it: the worker sees at once what
        is written, and only finished words may be. A frame that is not submitted is to be discarded.

        Args:
            spec: of the tensor.
            kept: the frame may be read until the reply is taken, also after the link has failed; the worker may write
                to it.
        """
        size = codec.size_of(spec)
        slot = self._transport.allocate(size, kept=kept) if size else None
        if slot is None:
            return codec.empty(spec)
        self._has_slots = True
        return codec.tensor_of(spec, slot), slot

    def framed(self, x: Tensor, dtype: torch.dtype) -> memoryview:
        """Return a frame of a tensor in a dtype, to submit: in shared memory if there is room, else in private memory.

        That may be the tensor's own, which must not change until the reply has come. Only what may leave is given.
        """
        slot = self._transport.allocate(x.numel() * dtype.itemsize) if x.numel() else None
        if slot is None:
            return codec.frame_of(x if x.dtype == dtype else x.to(dtype))
        self._has_slots = True
        try:
            codec.tensor_of(TensorSpec(codec.dtype_name(dtype), tuple(x.shape)), slot).copy_(x)
        except BaseException:
            self._transport.discard(slot)
            raise
        return slot

    def discard(self, *frames: Buffer) -> None:
        """Give back frames of ``room`` and ``framed`` that are not submitted."""
        for frame in frames:
            if isinstance(frame, memoryview):
                self._transport.discard(frame)

    def submit(self, make: Callable[[int], AnyRequest], frames: Sequence[Buffer] = (), operation: str = "") -> int:
        """Send a request without waiting.

        Args:
            make: builds the header from the request id.
            frames: tensor frames; they must not change until the reply has come. Where this raises, slots among them
                are given back.
            operation: the request's name in messages.

        Returns:
            The request id, to be given to ``result``.

        Raises:
            InputError: too many requests are in flight, or this one is too large for the transport.
        """
        try:
            request_id = self._sent(make, frames, operation)
        except BaseException:
            self.discard(*frames)
            raise
        self._frames[request_id] = frames
        return request_id

    def _sent(self, make: Callable[[int], AnyRequest], frames: Sequence[Buffer], operation: str) -> int:
        if len(self._waiting) >= MAX_IN_FLIGHT:
            raise InputError(
                f"{MAX_IN_FLIGHT} requests to {self.peer} are in flight already; collect their results first."
            )
        request_id = self._next_id
        self._next_id += 1
        header = make(request_id)
        encoded = messages.encode(header)
        message = [encoded, *frames]
        operation = operation or type(header).__name__.lower()
        if self.meter.recorder is not None:
            self.meter.recorder.sent(request_id, operation)
        self._transport.send(message)
        self._waiting[request_id] = operation
        self._headers[request_id] = encoded
        self.meter.round_trips += 1
        self.meter.bytes_sent += sum(map(len, message))
        return request_id

    def result(
        self, request_id: int, kind: type[ReplyType], timeout_s: float | None = None
    ) -> tuple[ReplyType, Sequence[Buffer]]:
        """Wait for one reply; return it and its tensor frames, which are the enclave's own.

        Args and errors are those of ``delivered``.
        """
        reply, delivery = self.delivered(request_id, kind, timeout_s)
        return reply, delivery.private()

    def delivered(
        self, request_id: int, kind: type[ReplyType], timeout_s: float | None = None
    ) -> tuple[ReplyType, Delivery]:
        """Wait for one reply and leave its tensor frames where they are, perhaps in memory that the worker can change.

        For callers that read every word exactly once, such as one that unmasks into memory of its own, and then call
        ``Delivery.release``. Other replies that come meanwhile are copied and kept for their own callers: left in place
        they could take the room that the awaited one needs.

        Args:
            request_id: from ``submit``.
            kind: the type of reply that the request has.
            timeout_s: instead of the session's own.

        Raises:
            TransportTimeoutError, TransportClosedError: the worker is slow or gone.
            BusyError: it refused the request, sent again and again, until the time was over.
            ProtocolError: it sent something invalid or never asked for.
            InputError, DeviceMemoryError: it could not carry the request out.
            InternalError: no such request is in flight.
        """
        if request_id not in self._waiting:
            raise InternalError(f"request {request_id} to {self.peer} was never made, or its result has been taken.")
        limit = self._timeout_s if timeout_s is None else timeout_s
        started = time.monotonic_ns()
        try:
            while request_id not in self._arrived:
                left = limit - (time.monotonic_ns() - started) / 1e9
                self._receive(request_id, max(0.0, left), limit)
        finally:
            self.meter.waited_ns += time.monotonic_ns() - started
            if self.meter.recorder is not None:
                self.meter.recorder.span("waiting", started)
        reply, delivery = self._arrived.pop(request_id)
        operation = self._waiting.pop(request_id)
        self._headers.pop(request_id)
        self.discard(*self._frames.pop(request_id))
        if not isinstance(reply, kind):
            delivery.release()
        if isinstance(reply, Failure):
            raise _failure(reply, operation, f"{self._role} {self.peer}")
        if not isinstance(reply, kind):
            raise ProtocolError(
                f"{operation} at {self.peer}: expected a reply of type {kind.__name__}, got {type(reply).__name__}."
            )
        if isinstance(reply, messages.Result):
            self.meter.compute_ns += reply.compute_ns
            self.meter.copy_ns += reply.copy_ns
            if self.meter.recorder is not None:
                self.meter.recorder.taken(request_id, reply.started_ns, reply.compute_ns)
        return reply, delivery

    def _receive(self, awaited: int, timeout_s: float, limit_s: float) -> None:
        wait_s = min(timeout_s, self._send_again()) if self._refusals else timeout_s
        try:
            delivery = self._transport.receive(wait_s)
        except TransportTimeoutError as error:
            if wait_s < timeout_s:
                return
            if sentence := self._refusals.sentence(awaited):
                raise BusyError(f"{self._waiting[awaited]}: {sentence}") from error
            raise TransportTimeoutError(
                f"{self._waiting[awaited]}: the {self._role} at {self.peer} did not answer within {limit_s:g} s "
                "(TSQP_REQUEST_TIMEOUT_S sets the limit)."
            ) from error
        self.meter.bytes_received += sum(map(len, delivery.frames))
        try:
            reply, tensors = codec.decode_reply(delivery.frames)
        except ProtocolError as error:
            delivery.release()
            raise ProtocolError(f"{self._waiting[awaited]} at {self.peer}: {error}") from error
        if isinstance(reply, Failure) and reply.code == "busy" and self._was_refused(reply):
            return
        if self._refusals:
            self._refusals.forget(reply.id)
        if reply.id in self._abandoned:
            self._abandoned.remove(reply.id)
            delivery.release()
            return
        if reply.id not in self._waiting or reply.id in self._arrived:
            delivery.release()
            raise ProtocolError(f"{self.peer} answered a request that is not in flight.")
        if self.meter.recorder is not None:
            self.meter.recorder.arrived(reply.id)
        delivery = Delivery(tensors, delivery.shared, delivery.release)
        self._arrived[reply.id] = (reply, delivery if reply.id == awaited else Delivery(delivery.private()))

    def _was_refused(self, reply: Failure) -> bool:
        """Note a request that was refused and can be sent again, with the same bytes; tell whether it is one."""
        frames = self._frames.get(reply.id)
        if frames is None or (frames and self._has_slots) or reply.id in self._arrived:
            return False
        self._refusals.add(reply.id, f"the {self._role} at {self.peer} is busy: {printable(reply.message)}")
        return True

    def _send_again(self) -> float:
        """Send what was refused long enough ago; return in how many seconds there is more."""
        for request_id in self._refusals.due():
            message = [self._headers[request_id], *self._frames[request_id]]
            self._transport.send(message)
            self.meter.bytes_sent += sum(map(len, message))
        return self._refusals.pause_s()

    def abandon(self, requests: Iterable[int] | None = None) -> None:
        """Forget requests in flight, by default every one: their replies are dropped when they come.

        Args:
            requests: ids; those whose replies were taken are let be.
        """
        for request_id in list(self._waiting) if requests is None else requests:
            if self._waiting.pop(request_id, None) is None:
                continue
            self._headers.pop(request_id)
            self.discard(*self._frames.pop(request_id))
            arrived = self._arrived.pop(request_id, None)
            if arrived:
                arrived[1].release()
            elif self._refusals.is_sent(request_id):
                self._abandoned.add(request_id)
            self._refusals.forget(request_id)

    def hello(self, timeout_s: float) -> messages.Welcome:
        """Ask the worker who it is.

        Raises:
            TransportTimeoutError: nothing answers there within ``timeout_s`` seconds.
            ProtocolError: something answers that is no worker of this protocol version.
        """
        request_id = self.submit(lambda i: messages.Hello(id=i, software=f"tsqp {__version__}"))
        try:
            return self.result(request_id, messages.Welcome, timeout_s)[0]
        except TransportTimeoutError as error:
            raise TransportTimeoutError(
                f"no TSQP {self._role} answered at {self.peer} within {timeout_s:g} s. "
                "Is it running, and done loading? "
                f"Start one with {_START[self._role]} and check host and port."
            ) from error

    def close(self) -> None:
        """Close the link at once."""
        self._transport.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a peer must say of itself when it is met.

    Attributes:
        serves: what it answers.
        digest: of the model; for integer levels, of its codes.
        dtype: of its weights.
        groups: the model's linear groups, in order.
        wire_dtype: in which activations will travel; None at the integer levels.
    """

    serves: messages.Service
    digest: str
    dtype: str
    groups: tuple[LinearGroup, ...]
    wire_dtype: str | None = None


_ADVICE: dict[str, str] = {
    "open": "float weights, for the level open: start it with 'tsqp worker'",
    "exact": "int8 codes, for the levels verified and masked: start it with 'tsqp worker --exact'",
    "masks": "mask products: start it with 'tsqp dealer'",
}


def check_peer(welcome: messages.Welcome, expected: Expected, peer: str) -> None:
    """Check that a worker or dealer serves what this enclave expects. It catches mistakes, not lies.

    Raises:
        ModelMismatchError: another kind of service, another model, other shapes or another dtype.
    """
    if welcome.serves != expected.serves:
        raise ModelMismatchError(
            f"the process at {peer} serves {_ADVICE[welcome.serves].partition(':')[0]}; "
            f"this side needs {_ADVICE[expected.serves]}."
        )
    if welcome.model_digest != expected.digest:
        raise ModelMismatchError(
            f"the {_role(welcome)} at {peer} holds model {printable(welcome.model)!r} "
            f"(digest {printable(welcome.model_digest[:12])}), "
            f"this side expects digest {expected.digest[:12]}: start both with the same model."
        )
    if welcome.dtype != expected.dtype:
        raise ModelMismatchError(
            f"the {_role(welcome)} at {peer} computes in {welcome.dtype}, this side asks for {expected.dtype}: "
            "start both with the same --dtype (LLAMA_DTYPE)."
        )
    if expected.wire_dtype is not None and expected.wire_dtype not in welcome.wire_dtypes:
        raise ModelMismatchError(
            f"the {_role(welcome)} at {peer} takes activations as {', '.join(welcome.wire_dtypes) or 'nothing'}, "
            f"this side would send {expected.wire_dtype}: choose another wire dtype (TSQP_WIRE_DTYPE)."
        )
    ours = [(group.name, group.in_features, group.out_features) for group in expected.groups]
    theirs = [(group.name, group.in_features, group.out_features) for group in welcome.groups]
    if ours != theirs:
        raise ModelMismatchError(
            f"the {_role(welcome)} at {peer} lists other linear groups than the model has: upgrade the older side."
        )


def _role(welcome: messages.Welcome) -> str:
    return "dealer" if welcome.serves == "masks" else "worker"


def _failure(reply: Failure, operation: str, peer: str) -> Exception:
    text = f"{operation} failed at the {peer}: {printable(reply.message)}"
    kinds: dict[str, type[Exception]] = {
        "memory": DeviceMemoryError,
        "input": InputError,
        "busy": BusyError,
        "internal": InternalError,
    }
    return kinds.get(reply.code, ProtocolError)(text)
