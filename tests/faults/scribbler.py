"""A client of shared memory that stops in the middle of a message, or breaks the rules, and waits to be killed.

python -m faults.scribbler shm:///path SEED
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

from tsqp.transport import datagrams
from tsqp.transport.link import Link
from tsqp.transport.polled import connect_named
from tsqp.transport.rings import RingBell
from tsqp.transport.shm import ShmClient, connect_socket
from tsqp.transport.urls import parse
from tsqp.wire import messages

MESSAGE_BYTES = 4 << 20
_ROWS, _WIDTH = 64, 48
_TENSOR_BYTES = 4 * _ROWS * _WIDTH
_WAIT_S = 60.0


class Scribbler:
    """Does one thing of ``KINDS``.

    Args:
        client: linked, and greeted.
        chance: where in the middle.
    """

    def __init__(self, client: ShmClient, chance: random.Random) -> None:
        self._link: Link = client._link
        self._client, self._chance = client, chance

    def half_a_tensor(self) -> memoryview:
        """Write the beginning of a tensor, and no message."""
        slot = self._client.allocate(_TENSOR_BYTES)
        assert slot is not None
        size = self._chance.randrange(_TENSOR_BYTES)
        slot[:size] = self._chance.randbytes(size)
        return slot

    def a_message_of_half_a_tensor(self) -> None:
        """Send what was written so far; its answer is never read."""
        spec = messages.TensorSpec("float32", (_ROWS, _WIDTH))
        header = messages.encode(messages.Linear(id=2, group="layers.0.qkv", x=spec))
        self._client.send([header, self.half_a_tensor()])

    def a_datagram_cut_short(self) -> None:
        """Send the beginning of a message's datagram."""
        whole = datagrams.write([0, _TENSOR_BYTES], [])
        self._link.bell.send(whole[: self._chance.randrange(1, len(whole))])

    def a_tensor_outside(self) -> None:
        """Send a message whose tensor ends behind the region."""
        self._link.bell.send(datagrams.write([self._link.half - 8, _TENSOR_BYTES], []))

    def a_wrong_counter(self) -> None:
        """Say that replies were consumed that never came, and ask for one more."""
        self._link._counters[self._link._own_counter] = self._chance.randrange(1 << 40, 1 << 50)
        self._hello()

    def half_a_record(self) -> None:
        """In a named region: move the ring's head beyond what was written. Elsewhere: half a datagram."""
        bell = self._link.bell
        if not isinstance(bell, RingBell):
            self.a_datagram_cut_short()
            return
        ring = bell._outgoing
        ring._words[ring._head] = ring._written + 8 * self._chance.randrange(1, 64)

    def _hello(self) -> None:
        self._client.send([messages.encode(messages.Hello(id=1, software="soak"))])

    def greet(self) -> None:
        """Say hello, and wait for the answer."""
        self._hello()
        self._client.receive(_WAIT_S).release()


KINDS: tuple[Callable[[Scribbler], object], ...] = (
    Scribbler.half_a_tensor,
    Scribbler.a_message_of_half_a_tensor,
    Scribbler.a_datagram_cut_short,
    Scribbler.a_tensor_outside,
    Scribbler.a_wrong_counter,
    Scribbler.half_a_record,
)


def main(address: str, seed: int) -> None:
    """Connect, scribble, say what, and wait."""
    endpoint, chance = parse(address), random.Random(seed)
    connect = connect_named if endpoint.is_named_region else connect_socket
    scribbler = Scribbler(connect(endpoint, MESSAGE_BYTES), chance)
    scribbler.greet()
    kind = chance.choice(KINDS)
    kind(scribbler)
    sys.stdout.write(f"{kind.__name__}\n")
    sys.stdout.flush()
    time.sleep(_WAIT_S)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
