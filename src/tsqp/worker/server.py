"""The worker's loop: one message in, one reply out, in order of arrival."""

from __future__ import annotations

from tsqp.transport.base import Incoming, ServerTransport
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.legacy import LegacyDispatcher, refuse
from tsqp.worker.services import OpenService

_POLL_S = 0.5


class Worker:
    """Serves one model over one transport until stopped.

    Args:
        dispatcher: answers the current protocol.
        transport: where messages come from.
    """

    def __init__(self, dispatcher: Dispatcher, transport: ServerTransport) -> None:
        self.dispatcher = dispatcher
        service = dispatcher.service
        self._legacy = (
            LegacyDispatcher(service.linears, service.state).answer if isinstance(service, OpenService) else refuse
        )
        self._transport = transport
        self._stopping = False

    def serve(self) -> None:
        """Answer messages until ``stop`` is called or the parent hangs up. The request in hand is finished."""
        while not (self._stopping or self._transport.hung_up):
            incoming = self._transport.receive(_POLL_S)
            if incoming is not None:
                incoming.reply(self._answer(incoming))

    def stop(self) -> None:
        """End ``serve`` after the current request. Safe to call from a signal handler."""
        self._stopping = True

    def _answer(self, incoming: Incoming) -> list[bytes | bytearray | memoryview]:
        answer = self._legacy if incoming.legacy else self.dispatcher.answer
        return answer(incoming.frames)
