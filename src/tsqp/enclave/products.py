"""Exact products by an untrusted worker: in clear (`verified`) or masked, and checked before anything sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from tsqp.arith.native import Scaling
from tsqp.enclave.freivalds import Checker, Expectation
from tsqp.enclave.mask_pool import MaskPool
from tsqp.enclave.masks import Mask
from tsqp.enclave.session import Session
from tsqp.errors import HostileError, IntegrityError, InternalError, TransportClosedError, TransportError
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup
from tsqp.model.overlap import Pending
from tsqp.wire import codec, messages
from tsqp.wire.codec import Claim
from tsqp.wire.messages import TensorSpec


class Answer(NamedTuple):
    """What a worker claims a product to be, perhaps in memory that it can still change, until ``release`` is called."""

    claim: Claim
    release: Callable[[], None]


class _Request(NamedTuple):
    """What is sent, and sent again where the link fails.

    The frame may be a slot, kept by the session until the reply is taken. Nothing else of ours is written there until
    then, and the region ends with its link: a retry finds the words that left at first, or what the worker has put in
    their place. Either tells the worker nothing, as it could read every word where it lay. Other words than the first
    fail the check, whose expectation comes from the integers, so that all such a worker gains is an ``IntegrityError``,
    which a wrong product would get it too. Where memory may be somebody else's once the link has failed, as in a named
    region, there are no such slots.
    """

    group: str
    spec: TensorSpec
    frame: memoryview

    def copied(self) -> _Request:
        """Return the same with private memory: read once, so that all further attempts send the same."""
        return self._replace(frame=memoryview(bytearray(self.frame)))


class _Sent(NamedTuple):
    """A request on its way: its number, and over which link."""

    session: Session
    request_id: int


class ExactWorker:
    """A worker that multiplies modulo 2^32. Where the link fails it is opened anew and the same bytes are sent again.

    After the last attempt has failed, the next product opens the link again.

    Args:
        open_session: connects, and checks that the peer is the right one.
        groups: the model's linear groups by name.
        retries: how often one product is sent again.

    Raises:
        TransportError, HostileError, ModelMismatchError: as ``open_session``.
    """

    def __init__(self, open_session: Callable[[], Session], groups: Mapping[str, LinearGroup], retries: int) -> None:
        self._open_session = open_session
        self._groups = groups
        self._retries = retries
        self.session = open_session()
        self._lost = False

    @property
    def peer(self) -> str:
        """The worker's name, for messages."""
        return f"worker {self.session.peer}"

    def start(self, group: str, rows: int, write: Callable[[Tensor], None]) -> Callable[[], Answer]:
        """Send integers or masked words; call the result for what the worker claims their products to be.

        Args:
            group: the linear group's name.
            rows: how many, M.
            write: stores them in an int32 tensor (M, K), which may be shared with the worker: each word once. Called
                once; a retry sends what was written then, so that a mask hides one input only.

        Raises:
            TransportError: the link failed, and failed again; also when the answer is collected.
            ProtocolError: the reply is malformed; when the answer is collected.
        """
        spec = TensorSpec("int32", (rows, self._groups[group].in_features))
        x_MK, frame = self._room(spec)
        try:
            write(x_MK)
        except BaseException:
            self.session.discard(frame)
            raise
        request = _Request(group, spec, frame)
        try:
            return partial(self._collect, request, self._send(request), self._retries + 1)
        except TransportError:
            if not self._retries:
                raise
            return partial(self._collect, request, None, self._retries)

    def _room(self, spec: TensorSpec) -> tuple[Tensor, memoryview]:
        """Return a tensor to write and its frame: in shared memory where words to send again may lie there."""
        if not self._lost:
            try:
                return self.session.room(spec, kept=self._retries > 0)
            except TransportError:
                self.lose()
        x_MK = torch.empty(spec.shape, dtype=torch.int32)
        return x_MK, codec.frame_of(x_MK)

    def _collect(self, request: _Request, sent: _Sent | None, attempts: int) -> Answer:
        if not self._retries and not self._is_on_its_way(sent):
            # Its slot was not kept: who knows whose words lie there.
            raise TransportClosedError(f"linear {request.group}: the link to {self.peer} was lost with the request.")
        for left in reversed(range(attempts)):
            try:
                if sent is None or not self._is_on_its_way(sent):
                    request = request.copied()
                    sent = self._send(request)
                return self._received(request, sent)
            except TransportError:  # noqa: PERF203  one try for each attempt
                self.lose()
                if not left:
                    raise
        raise InternalError(f"linear {request.group}: no attempt was made.")

    def _is_on_its_way(self, sent: _Sent | None) -> bool:
        return sent is not None and sent.session is self.session and not self._lost

    def _send(self, request: _Request) -> _Sent:
        """Send over the link, opened anew if it was lost. All that was in flight is lost with a link."""
        try:
            if self._lost:
                self.session, self._lost = self._open_session(), False
            header = partial(messages.LinearExact, group=request.group, x=request.spec)
            number = self.session.submit(lambda i: header(id=i), [request.frame], f"linear {request.group}")
            return _Sent(self.session, number)
        except TransportError:
            self.lose()
            raise

    def open_again(self) -> bool:
        """Open the link if it was lost, and tell whether it was; the next product would.

        Raises:
            TransportError, HostileError, ModelMismatchError: as ``open_session``.
        """
        if not self._lost:
            return False
        self.session, self._lost = self._open_session(), False
        return True

    def look(self, timeout_s: float) -> None:
        """Ask the worker for a sign of life; a link without one is lost.

        Raises:
            TransportError: it gave none in this time, or the link was lost before.
            ProtocolError: it sent something else.
        """
        if self._lost:
            raise TransportClosedError(f"the link to {self.peer} was lost.")
        try:
            self.session.hello(timeout_s)
        except TransportError:
            self.lose()
            raise

    def lose(self) -> None:
        """Close the link, until it is opened again: nobody answers there, or what comes is of no use."""
        if not self._lost:
            self.session.close()
            self._lost = True

    def _received(self, request: _Request, sent: _Sent) -> Answer:
        reply, delivery = sent.session.delivered(sent.request_id, messages.Result)
        expect = TensorSpec("int32", (request.spec.shape[0], self._groups[request.group].rows))
        try:
            claim = codec.claim(reply, delivery.frames, expect, f"linear {request.group} from {self.peer}")
        except BaseException:
            delivery.release()
            raise
        return Answer(claim, delivery.release)

    def abandon(self) -> None:
        """Forget what is on its way and will not be collected."""
        self.session.abandon()

    def close(self) -> None:
        """Close the link."""
        self.session.close()


class CheckedProducts:
    """`verified` and `masked`: the only way from a worker's words to a value is through the check.

    After a wrong product or a malformed reply everyone who contributed is out of use: every later product raises.

    Args:
        worker: multiplies.
        checkers: by group.
        pool: masks; None sends integers in clear (`verified`).
        meter: where costs are counted.
    """

    def __init__(
        self, worker: ExactWorker, checkers: Mapping[str, Checker], pool: MaskPool | None, meter: Meter
    ) -> None:
        self._worker = worker
        self._checkers = checkers
        self._pool = pool
        self._meter = meter
        self._distrusted: str | None = None

    def start(self, group: str, xq_MK: Tensor, scaling: Scaling | None = None) -> Pending:
        """See ``Products.start``.

        Raises:
            IntegrityError: a row is wrong, or one was before; nothing of the reply has been used. When it is collected.
            ProtocolError: a reply is malformed.
        """
        with self._distrusting():
            mask = self._pool.take(group, len(xq_MK)) if self._pool is not None else None
            answer = self._worker.start(group, len(xq_MK), partial(self._write, xq_MK, mask))
            with self._meter.while_away():
                u = mask.products() if mask is not None else ()
                expectation = self._checkers[group].expect(xq_MK, u, scaling)
                if self._pool is not None:
                    self._pool.make_words_ahead(group, len(xq_MK))
            return partial(self._collect, group, expectation, answer)

    def _write(self, xq_MK: Tensor, mask: Mask | None, out_MK: Tensor) -> None:
        """Store what may leave; the worker may be watching."""
        if mask is None:
            out_MK.copy_(xq_MK)
            return
        with self._meter.span("mask"):
            mask.add(xq_MK, out_MK)

    def _collect(self, group: str, expectation: Expectation, answered: Callable[[], Answer]) -> Tensor:
        with self._distrusting():
            answer = answered()
            try:
                with self._meter.span("check"):
                    y_MN = self._checkers[group].verified(answer.claim, expectation, self._peers)
            finally:
                answer.release()
            self._meter.verified_rows += len(y_MN)
            return y_MN

    @property
    def _peers(self) -> tuple[str, ...]:
        """Who contributes to a product."""
        return (self._worker.peer, *(self._pool.peers if self._pool else ()))

    @contextmanager
    def _distrusting(self) -> Iterator[None]:
        """Refuse after a wrong product; put everyone out of use where this is one.

        A product that was being fetched meanwhile may have been wrong, so the pool is asked again at the end.
        """
        if self._distrusted:
            raise IntegrityError(f"out of use since a wrong product: {self._distrusted}")
        try:
            yield
        except HostileError as error:
            self._distrusted = str(error)
            if self._pool is not None:
                self._pool.distrust(str(error))
            raise
        if self._pool is not None:
            self._pool.check_trusted()

    def abandon(self) -> None:
        """See ``Products.abandon``. Masks that were put on stay used up."""
        self._worker.abandon()
