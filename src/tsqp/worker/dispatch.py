"""Reads requests of the current protocol and writes their replies: frames in, frames out.

What needs no product is answered at once. A request for a product is checked and becomes ``Waiting``; whoever computes
it hands the ``Product`` back.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from tsqp import __version__
from tsqp.errors import BusyError, DeviceMemoryError, InputError, InternalError, ProtocolError, TsqpError, printable
from tsqp.model.architecture import module_count
from tsqp.model.linears import is_out_of_memory, out_of_memory
from tsqp.transport.base import Client, Incoming
from tsqp.wire import codec, legacy, messages
from tsqp.wire.codec import Buffer
from tsqp.wire.messages import AnyRequest, Failure, GroupSpec
from tsqp.worker.batching import Queue, Rows, Waiting
from tsqp.worker.clients import Clients, Limits
from tsqp.worker.memory import device_memory
from tsqp.worker.products import Product, Result, compute
from tsqp.worker.services import WorkerService

_log = logging.getLogger(__name__)
_envelope = msgspec.msgpack.Decoder(messages.Envelope)

# Of a number of a result, in bytes.
_WIDEST = 4
Send = Callable[[Sequence[Buffer]], None]
_CODES: tuple[tuple[type[TsqpError], messages.ErrorCode], ...] = (
    (codec.VersionError, "version"),
    (ProtocolError, "protocol"),
    (DeviceMemoryError, "memory"),
    (BusyError, "busy"),
    (InputError, "input"),
)


class Dispatcher:
    """Turns requests into replies for one model.

    Args:
        service: computes the products.
        model: the name or path it was started with; clients are shown the last part.
        digest: the model's digest; of int8 codes, theirs.
        limits: what its clients may make it hold.

    Attributes:
        queue: requests that were admitted and wait for a product; whoever computes puts them there.
    """

    def __init__(self, service: WorkerService, model: str, digest: str, limits: Limits | None = None) -> None:
        self.service = service
        self.clients = Clients(limits or Limits())
        self.queue = Queue()
        # Who asks by ``answer``, without a transport.
        self._direct = Client()
        self._instance = os.urandom(16).hex()
        self._model = printable(Path(model).name)[: messages.MAX_NAME] or "model"
        self.digest = digest
        self._started = time.monotonic()
        self.requests: Counter[type[AnyRequest]] = Counter()
        self.errors = self.bytes_received = self.bytes_sent = self.compute_ns = self.copy_ns = 0
        self.products = self.product_requests = self.rows = self.legacy = 0
        # What needs no product.
        self._answers: dict[type[AnyRequest], Callable[[int], list[Buffer]]] = {
            messages.Hello: lambda request_id: [messages.encode(self.welcome(request_id))],
            messages.Stats: lambda request_id: [messages.encode(self.stats(request_id))],
            messages.State: self._state_reply,
        }

    def answer(self, frames: Sequence[Buffer]) -> list[Buffer]:
        """Return the reply to any frames at all: what is not a valid request is answered with a failure."""
        replies: list[list[Buffer]] = []
        take: Send = lambda reply: replies.append(list(reply))  # noqa: E731
        waiting = self.admit(Incoming(tuple(frames), legacy=False, reply=take, client=self._direct))
        if waiting:
            self.finish(compute(self.service, [waiting]))
        return replies[0]

    def admit(self, incoming: Incoming) -> Waiting | None:
        """Take any message at all in. What needs no product, or is not valid, is answered before this returns.

        Returns:
            The request, if a product must be computed for it.
        """
        frames, reply = incoming.frames, incoming.reply
        size_bytes = sum(map(len, frames))
        self.bytes_received += size_bytes
        try:
            request = codec.decode_request(frames)
            header = request.header
            self.requests[type(header)] += 1
            answer = self._answers.get(type(header))
            if not isinstance(header, messages.Stats):  # which is for who watches the worker, also when it is full
                account = self.clients.account(incoming.client)
            if answer is None:
                account.check_room()
                rows = self.service.rows(header, request.tensors)
                held_bytes = size_bytes + reply_bytes(self.service, header, rows)
                account.add(held_bytes)
                return Waiting(header, request.tensors, rows, incoming, size_bytes, account, held_bytes)
            if isinstance(header, messages.State):
                account.check_room()
            self._send(reply, answer(header.id))
        except Exception as error:  # noqa: BLE001  what a client sends must not end the worker for the others
            request_id = error.request_id if isinstance(error, codec.VersionError) else _request_id(frames)
            self._send(reply, self._failure(request_id, error))
        return None

    def pass_on(self, incoming: Incoming, answer: Callable[[Sequence[Buffer]], list[Buffer]]) -> None:
        """Have a message of the first protocol answered, and count it; its client is bounded as others are."""
        self.legacy += 1
        self.bytes_received += sum(map(len, incoming.frames))
        try:
            self.clients.account(incoming.client).check_room()
        except BusyError as error:
            self.clients.refused += 1
            self._send(incoming.reply, [legacy.failure(str(error))])
            return
        self._send(incoming.reply, answer(incoming.frames))

    def finish(self, products: Sequence[Product]) -> None:
        """Reply to every request that these products answer."""
        for product in products:
            started_ns = max(0, time.monotonic_ns() - product.compute_ns)  # it is done now; for display only
            for request, outcome in zip(product.requests, product.outcomes, strict=True):
                times = (*product.shares_ns(request), started_ns)
                request.account.remove(request.held_bytes)
                self._send(request.incoming.reply, self._result(request, outcome, times))
                if _log.isEnabledFor(logging.DEBUG):
                    _say(request, outcome, times[0])
            self.products += 1
            self.product_requests += len(product.requests)
            self.rows += sum(request.rows.count for request in product.requests if request.rows)
            self.compute_ns += product.compute_ns
            self.copy_ns += product.copy_ns

    def _result(self, request: Waiting, outcome: Result | Exception, times: tuple[int, int, int]) -> list[Buffer]:
        if isinstance(outcome, Exception):
            return self._failure(request.header.id, outcome)
        compute_ns, copy_ns, started_ns = times
        result = messages.Result(
            id=request.header.id, y=outcome.spec, compute_ns=compute_ns, started_ns=started_ns, copy_ns=copy_ns
        )
        return [messages.encode(result), outcome.frame]

    def _send(self, reply: Send, frames: list[Buffer]) -> None:
        reply(frames)
        self.bytes_sent += sum(map(len, frames))

    def _state_reply(self, request_id: int) -> list[Buffer]:
        if self.service.serves != "open":
            raise InputError("norm weights are given away at the level open only; this process does not have them.")
        state = self.service.state
        reply = messages.StateResult(
            id=request_id, names=tuple(state), tensors=tuple(map(codec.spec_of, state.values()))
        )
        return [messages.encode(reply), *map(codec.frame_of, state.values())]

    def welcome(self, request_id: int = 0) -> messages.Welcome:
        """Return what a client is told of this worker."""
        service = self.service
        groups = tuple(
            GroupSpec(group.name, group.members, group.in_features, group.out_features)
            for group in service.groups.values()
        )
        return messages.Welcome(
            id=request_id,
            software=f"tsqp {__version__}",
            instance=self._instance,
            serves=service.serves,
            model=self._model,
            model_digest=self.digest,
            device=str(service.device),
            dtype=codec.dtype_name(service.dtype),
            module_count=module_count(service.groups.values()),
            groups=groups,
            wire_dtypes=service.wire_dtypes,
        )

    def stats(self, request_id: int = 0) -> messages.StatsResult:
        """Return the counters. Any thread may ask: the loop goes on meanwhile."""
        requests = {kind.__name__.lower(): count for kind, count in list(self.requests.items())}
        if self.legacy:
            requests["legacy"] = self.legacy
        used_bytes, total_bytes = device_memory(self.service.device)
        return messages.StatsResult(
            id=request_id,
            uptime_s=time.monotonic() - self._started,
            requests=requests,
            errors=self.errors,
            bytes_received=self.bytes_received,
            bytes_sent=self.bytes_sent,
            compute_s=self.compute_ns / 1e9,
            products=self.products,
            product_requests=self.product_requests,
            rows=self.rows,
            copy_s=self.copy_ns / 1e9,
            clients=len(self.clients),
            refused=self.clients.refused,
            waiting=len(self.queue),
            waiting_bytes=self.queue.size_bytes,
            device_memory_bytes=used_bytes,
            device_memory_total_bytes=total_bytes,
        )

    def _failure(self, request_id: int, error: Exception) -> list[Buffer]:
        """Write the failure that an error becomes. A bug's own words stay in the log.

        Memory may be lacking anywhere, also for what is copied around a product: that is no bug. The error forgets
        where it was raised: those frames have the request, and would wait with the error for the garbage collector, and
        with them the memory that the client shared, long after that is gone.
        """
        if isinstance(error, BusyError):
            self.clients.refused += 1
        else:
            self.errors += 1
        raised = error
        if is_out_of_memory(error):
            error = out_of_memory("a request", self.service.device)
        code: messages.ErrorCode = next((code for kind, code in _CODES if isinstance(error, kind)), "internal")
        if code == "internal":
            _log.error("request failed", exc_info=error, extra={"request_id": request_id})
            error = InternalError("the worker failed on this request; its log says how.")
        else:  # its text may quote what the client sent
            _log.debug("request refused (%s)", code, extra={"request_id": request_id})
        raised.__traceback__ = raised.__cause__ = raised.__context__ = None
        return [messages.encode(Failure(id=request_id, code=code, message=str(error)[:2048]))]


def _say(request: Waiting, outcome: Result | Exception, compute_ns: int) -> None:
    """Log a request that has been answered: what it was, how much, and for how long it computed."""
    if isinstance(outcome, Exception):
        return
    kind, rows = type(request.header).__name__.lower(), request.rows
    what = f"{kind}, {rows.count} rows by {rows.name}" if rows else kind
    extra = {"request_id": request.header.id, "duration_s": compute_ns / 1e9}
    _log.debug("%s: %d bytes in, %d out", what, request.size_bytes, len(outcome.frame), extra=extra)


def reply_bytes(service: WorkerService, header: AnyRequest, rows: Rows | None) -> int:
    """Return how many bytes of a result a request asks for, or more."""
    if rows is not None:
        return rows.count * service.widths(rows.name)[1] * _WIDEST
    match header:
        case messages.Embedding(ids=ids):
            hidden = next(iter(service.groups.values())).in_features
            return math.prod(ids.shape) * hidden * _WIDEST
        case messages.MatMul(a=a, b=b):
            return math.prod(a.shape[:-1]) * math.prod(b.shape[-1:]) * _WIDEST
        case messages.Codes(group=group, rows=count) if group in service.groups:
            return count * service.groups[group].in_features
    return 0


def _request_id(frames: Sequence[Buffer]) -> int:
    """Read the id of a request that is otherwise invalid, so that its sender learns of it; 0 if there is none."""
    try:
        return _envelope.decode(frames[0]).id if frames and len(frames[0]) <= codec.MAX_REQUEST_HEADER_BYTES else 0
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
