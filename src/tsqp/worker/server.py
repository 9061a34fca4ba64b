"""The worker's loop: takes in what waits, multiplies together what can be, and replies."""

from __future__ import annotations

from tsqp.transport.base import Incoming, ServerTransport
from tsqp.worker.ahead import WeightsAhead
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.legacy import LegacyDispatcher, refuse
from tsqp.worker.products import CpuEngine, Engine
from tsqp.worker.services import OpenService, WorkerService

_POLL_S = 0.5
# Behind a lone client nobody waits, and to look costs time: once this many products were for one request each, look
# after as many again.
_LOOK_EVERY = 16
# How many messages are taken in between two products at most.
MAX_TAKEN = 64


class Worker:
    """Serves one model over one transport until stopped.

    Args:
        dispatcher: answers the current protocol.
        transport: where messages come from.
        cuda_graphs: on a GPU, capture products that repeat.
    """

    def __init__(self, dispatcher: Dispatcher, transport: ServerTransport, *, cuda_graphs: bool = True) -> None:
        self.dispatcher = dispatcher
        service = dispatcher.service
        self._legacy = (
            LegacyDispatcher(service.linears, service.state).answer if isinstance(service, OpenService) else refuse
        )
        self._transport = transport
        self._engine = engine_for(service, cuda_graphs=cuda_graphs)
        self._queue = dispatcher.queue
        self._stopping = False
        # For how many products in a row only one request was there.
        self._alone = 0
        self._ahead = WeightsAhead(service) if service.device.type == "cpu" else None
        transport.ahead = self._ahead

    def serve(self) -> None:
        """Answer messages until ``stop`` is called or the parent hangs up. What was taken in is answered."""
        while not (self._stopping or self._transport.hung_up):
            self._take_in()
            self._work()
        while self._queue or self._engine.busy:
            self._work()

    def stop(self) -> None:
        """End ``serve`` after the current requests. Safe to call from a signal handler."""
        self._stopping = True

    def _take_in(self) -> None:
        """Wait for a message if there is nothing to do, and take in those that are here already."""
        if not (self._queue or self._engine.busy):
            if not self._receive(_POLL_S):
                return
            if self._alone > _LOOK_EVERY and self._alone % _LOOK_EVERY:
                return
        for _ in range(MAX_TAKEN):  # what is answered at once does not fill the queue
            if not self._queue.has_room or not self._receive(0.0):
                return

    def _receive(self, timeout_s: float) -> bool:
        incoming = self._transport.receive(timeout_s)
        if incoming:
            self._admit(incoming)
        return incoming is not None

    def _admit(self, incoming: Incoming) -> None:
        if incoming.legacy:
            self.dispatcher.pass_on(incoming, self._legacy)
            return
        request = self.dispatcher.admit(incoming)
        if request:
            self._queue.add(request)

    def _work(self) -> None:
        """Start the next product, and reply to the requests of those that are done."""
        rows = None
        if self._queue and self._engine.has_room:
            self._alone = self._alone + 1 if len(self._queue) == 1 else 0
            requests = self._queue.take()
            rows = requests[0].rows
            self._engine.start(requests)
        self.dispatcher.finish(self._engine.finished())
        if self._ahead and rows:
            self._ahead.after(rows.name)


def engine_for(service: WorkerService, *, cuda_graphs: bool) -> Engine:
    """Return what computes a service's products on its device. Several ranks compute one product at a time."""
    if service.device.type == "cuda" and service.ranks == 1:
        from tsqp.worker.cuda import CudaEngine  # noqa: PLC0415  a worker on a CPU does not need it

        return CudaEngine(service, graphs=cuda_graphs)
    return CpuEngine(service)
