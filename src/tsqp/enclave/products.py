"""Exact products by an untrusted worker: in clear (`verified`) or masked, and checked before anything sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tsqp.enclave.freivalds import Checker
from tsqp.enclave.mask_pool import MaskPool
from tsqp.enclave.session import Session
from tsqp.errors import HostileError, IntegrityError, InternalError, TransportError
from tsqp.meter import Meter
from tsqp.model.architecture import LinearGroup
from tsqp.wire import codec, messages
from tsqp.wire.codec import Claim
from tsqp.wire.messages import TensorSpec


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

    def multiply(self, group: str, x_MK: Tensor) -> Claim:
        """Send integers or masked words; return what the worker claims their products to be.

        Args:
            group: the linear group's name.
            x_MK: int32, contiguous. A retry sends this very memory, so that a mask hides one input only.

        Raises:
            TransportError: the link failed, and failed again.
            ProtocolError: the reply is malformed.
        """
        for left in reversed(range(self._retries + 1)):
            try:
                if self._lost:
                    self.session, self._lost = self._open_session(), False
                return self._multiply(group, x_MK)
            except TransportError:  # noqa: PERF203  one try for each attempt
                if not self._lost:
                    self.session.close()
                    self._lost = True
                if not left:
                    raise
        raise InternalError(f"linear {group}: no attempt was made.")

    def _multiply(self, group: str, x_MK: Tensor) -> Claim:
        operation = f"linear {group}"
        request_id = self.session.submit(
            lambda i: messages.LinearExact(id=i, group=group, x=codec.spec_of(x_MK)), [codec.frame_of(x_MK)], operation
        )
        reply, frames = self.session.result(request_id, messages.Result)
        expect = TensorSpec("int32", (len(x_MK), self._groups[group].rows))
        return codec.claim(reply, frames, expect, f"{operation} from {self.peer}")

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

    def __call__(self, group: str, xq_MK: Tensor) -> Tensor:
        """See ``Products``.

        Raises:
            IntegrityError: a row is wrong, or one was before; nothing of the reply has been used.
            ProtocolError: a reply is malformed.
        """
        if self._distrusted:
            raise IntegrityError(f"out of use since a wrong product: {self._distrusted}")
        try:
            return self._in_clear(group, xq_MK) if self._pool is None else self._masked(group, xq_MK, self._pool)
        except HostileError as error:
            self._distrusted = str(error)
            if self._pool is not None:
                self._pool.distrust(str(error))
            raise

    def _in_clear(self, group: str, xq_MK: Tensor) -> Tensor:
        claim = self._worker.multiply(group, xq_MK.contiguous())
        return self._verified(group, claim, xq_MK, (self._worker.peer,))

    def _masked(self, group: str, xq_MK: Tensor, pool: MaskPool) -> Tensor:
        mask = pool.take(group, len(xq_MK))
        with self._meter.span("mask"):
            xm_MK = mask.add(xq_MK)
        claim = self._worker.multiply(group, xm_MK)
        with self._meter.span("unmask"):
            unmasked = mask.remove(claim)
        y_MN = self._verified(group, unmasked, xq_MK, (self._worker.peer, *pool.peers))
        pool.check_trusted()
        return y_MN

    def _verified(self, group: str, claim: Claim, xq_MK: Tensor, peers: tuple[str, ...]) -> Tensor:
        with self._meter.span("check"):
            y_MN = self._checkers[group].verified(claim, xq_MK, peers)
        self._meter.verified_rows += len(y_MN)
        return y_MN
