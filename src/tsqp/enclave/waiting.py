"""Waiting for a peer that may have stopped: it does not outlast those who want the answer."""

from __future__ import annotations

from collections.abc import Callable

from tsqp.errors import TransportError, TransportTimeoutError
from tsqp.transport.base import ClientTransport, Delivery

LOOK_S = 0.25


class Impatient:
    """A link whose waiting ends where nobody wants the answer any more; all else is as it was.

    A peer that answers within ``LOOK_S`` is never given up, so that who leaves does not cost others a healthy link.

    Args:
        link: whose everything else this is.
        given_up: tells whether to give up; asked every ``LOOK_S`` while nothing comes.
    """

    def __init__(self, link: ClientTransport, given_up: Callable[[], bool]) -> None:
        self._receive, self._given_up = link.receive, given_up
        # The link's own, and no methods that pass on: there are hundreds of products a step.
        self.peer, self.allocate, self.discard = link.peer, link.allocate, link.discard
        self.send, self.close = link.send, link.close

    def receive(self, timeout_s: float) -> Delivery:
        """Wait for one message; see ``ClientTransport.receive``.

        Raises:
            TransportError: it was given up. The answer may still come, so the link is of no more use.
        """
        while timeout_s > LOOK_S:
            try:
                return self._receive(LOOK_S)
            except TransportTimeoutError:  # noqa: PERF203  one try for each look
                timeout_s -= LOOK_S
                if self._given_up():
                    raise TransportError(
                        f"{self.peer} did not answer before all who had asked were gone: the link is given up."
                    ) from None
        return self._receive(timeout_s)
