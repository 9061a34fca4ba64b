"""One enclave's conversation with one worker: who it is, requests in flight, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tsqp import __version__
from tsqp.errors import (
    DeviceMemoryError,
    InputError,
    InternalError,
    ModelMismatchError,
    ProtocolError,
    TransportTimeoutError,
)
from tsqp.model.architecture import LlamaConfig, linear_groups
from tsqp.transport.base import Buffer, ClientTransport
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyReply, AnyRequest, Failure

ReplyType = TypeVar("ReplyType", messages.Welcome, messages.Result, messages.StateResult, messages.StatsResult)

MAX_IN_FLIGHT = 1024


@dataclass(slots=True)
class Meter:
    """What a session has cost so far.

    ``waited_ns`` is time spent blocked on the worker, ``compute_ns`` the worker's own account of its work.
    """

    round_trips: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    waited_ns: int = 0
    compute_ns: int = 0


class Session:
    """Sends requests to a worker and matches replies to them. Not thread-safe.

    Args:
        transport: the link; the session owns and closes it.
        request_timeout_s: how long to wait for any one reply.
    """

    def __init__(self, transport: ClientTransport, request_timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = request_timeout_s
        self._next_id = 1
        self._waiting: dict[int, str] = {}
        self._arrived: dict[int, tuple[AnyReply, Sequence[Buffer]]] = {}
        self.meter = Meter()

    @property
    def peer(self) -> str:
        """The worker's address, for messages."""
        return self._transport.peer

    def submit(self, make: Callable[[int], AnyRequest], frames: Sequence[Buffer] = (), operation: str = "") -> int:
        """Send a request without waiting.

        Args:
            make: builds the header from the request id.
            frames: tensor frames; they must not change until the reply has come.
            operation: the request's name in messages.

        Returns:
            The request id, to be given to ``result``.

        Raises:
            InputError: too many requests are in flight, or this one is too large for the transport.
        """
        if len(self._waiting) >= MAX_IN_FLIGHT:
            raise InputError(
                f"{MAX_IN_FLIGHT} requests to {self.peer} are in flight already; collect their results first."
            )
        request_id = self._next_id
        self._next_id += 1
        header = make(request_id)
        message = [messages.encode(header), *frames]
        self._transport.send(message)
        self._waiting[request_id] = operation or type(header).__name__.lower()
        self.meter.round_trips += 1
        self.meter.bytes_sent += sum(map(len, message))
        return request_id

    def result(
        self, request_id: int, kind: type[ReplyType], timeout_s: float | None = None
    ) -> tuple[ReplyType, Sequence[Buffer]]:
        """Wait for one reply; others that come meanwhile are kept for their own callers.

        Args:
            request_id: from ``submit``.
            kind: the type of reply that the request has.
            timeout_s: instead of the session's own.

        Raises:
            TransportTimeoutError, TransportClosedError: the worker is slow or gone.
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
        reply, frames = self._arrived.pop(request_id)
        operation = self._waiting.pop(request_id)
        if isinstance(reply, Failure):
            raise _failure(reply, operation, self.peer)
        if not isinstance(reply, kind):
            raise ProtocolError(
                f"{operation} at {self.peer}: expected a reply of type {kind.__name__}, got {type(reply).__name__}."
            )
        if isinstance(reply, messages.Result):
            self.meter.compute_ns += reply.compute_ns
        return reply, frames

    def _receive(self, awaited: int, timeout_s: float, limit_s: float) -> None:
        try:
            frames = self._transport.receive(timeout_s)
        except TransportTimeoutError as error:
            raise TransportTimeoutError(
                f"{self._waiting[awaited]}: the worker at {self.peer} did not answer within {limit_s:g} s "
                "(TSQP_REQUEST_TIMEOUT_S sets the limit)."
            ) from error
        self.meter.bytes_received += sum(map(len, frames))
        reply, tensors = codec.decode_reply(frames)
        if reply.id not in self._waiting or reply.id in self._arrived:
            raise ProtocolError(f"{self.peer} answered a request that is not in flight.")
        self._arrived[reply.id] = (reply, tensors)

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
                f"no TSQP worker answered at {self.peer} within {timeout_s:g} s. Is it running, and done loading? "
                "Start one with 'tsqp worker' (or tee_gpu/server.py) and check host and port."
            ) from error

    def close(self) -> None:
        """Close the link at once."""
        self._transport.close()


def check_worker(welcome: messages.Welcome, config: LlamaConfig, digest: str, dtype: str, peer: str) -> None:
    """Check that a worker serves the model this enclave expects.

    Raises:
        ModelMismatchError: another model, other shapes or another dtype.
    """
    if welcome.model_digest != digest:
        raise ModelMismatchError(
            f"the worker at {peer} holds model {welcome.model!r} (digest {welcome.model_digest[:12]}), "
            f"this side expects digest {digest[:12]}: start both with the same model."
        )
    if welcome.dtype != dtype:
        raise ModelMismatchError(
            f"the worker at {peer} computes in {welcome.dtype}, this side asks for {dtype}: "
            "start both with the same --dtype (LLAMA_DTYPE)."
        )
    ours = [(group.name, group.in_features, group.out_features) for group in linear_groups(config)]
    theirs = [(group.name, group.in_features, group.out_features) for group in welcome.groups]
    if ours != theirs:
        raise ModelMismatchError(
            f"the worker at {peer} lists other linear groups than the model has: upgrade the older side."
        )


def _failure(reply: Failure, operation: str, peer: str) -> Exception:
    text = f"{operation} failed at the worker {peer}: {codec.printable(reply.message)}"
    kinds: dict[str, type[Exception]] = {"memory": DeviceMemoryError, "input": InputError, "internal": InternalError}
    return kinds.get(reply.code, ProtocolError)(text)
