"""Keeps what an observer on the other side of a link receives, and withholds the token ids among it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tsqp.errors import InputError
from tsqp.model.architecture import chain_name
from tsqp.transport.base import Buffer, ClientTransport, Delivery
from tsqp.wire import codec, messages

# Requests whose tensor is the prompt itself: the attacks work from activations, never from ids.
_WITHHELD = ("embedding",)


@dataclass(frozen=True, slots=True)
class Seen:
    """One tensor of one request.

    Attributes:
        operation: the request's name on the wire.
        group: the linear group it names, or the chain; empty where a request names none.
        tensor: a copy of what was sent.
    """

    operation: str
    group: str
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class Dealt:
    """One order for mask products: the seed and the rows a dealer is told. Its repr does not show the seed."""

    group: str
    seed: bytes = field(repr=False)
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Recording:
    """What one observer saw during a run, in order.

    Attributes:
        observer: ``worker``, or a dealer's name.
        seen: tensors received.
        dealt: orders for mask products received; only dealers get them.
    """

    observer: str
    seen: tuple[Seen, ...]
    dealt: tuple[Dealt, ...] = ()

    def tensors(self, group: str) -> list[Tensor]:
        """Return everything sent for a group, in order."""
        return [each.tensor for each in self.seen if each.group == group]

    def first(self, group: str) -> Tensor:
        """Return the first tensor sent for a group.

        Raises:
            InputError: nothing was sent for it.
        """
        found = self.tensors(group)
        if not found:
            raise InputError(f"the recording of {self.observer} holds nothing for {group!r}.")
        return found[0]

    def operands(self, operation: str) -> list[Tensor]:
        """Return the tensors of all requests of one operation, in order; a request may have several."""
        return [each.tensor for each in self.seen if each.operation == operation]


class RecordingTransport:
    """A link that passes everything on and keeps a copy of what each message says.

    Args:
        link: the link it wraps.
        observer: who is at its other end.
        groups: keep only these linear groups' tensors, to save memory; None keeps all.
    """

    def __init__(self, link: ClientTransport, observer: str = "worker", groups: frozenset[str] | None = None) -> None:
        self._link = link
        self._observer = observer
        self._groups = groups
        self._seen: list[Seen] = []
        self._dealt: list[Dealt] = []

    @property
    def peer(self) -> str:
        """See ``ClientTransport.peer``."""
        return self._link.peer

    def send(self, frames: Sequence[Buffer]) -> None:
        """See ``ClientTransport.send``.

        Raises:
            ProtocolError: this is no request of this protocol.
        """
        self._keep([bytes(frame) for frame in frames])
        self._link.send(frames)

    def _keep(self, frames: Sequence[bytes]) -> None:
        request = codec.decode_request(frames)
        header = request.header
        operation, group = str(header.__struct_config__.tag), str(getattr(header, "group", ""))
        named = {group} - {""}
        if isinstance(header, messages.LinearChain):
            named, group = set(header.groups), chain_name(header.groups)
        if operation in _WITHHELD or (self._groups is not None and named and not named & self._groups):
            return
        self._seen += [Seen(operation, group, tensor) for tensor in request.tensors]
        if isinstance(header, messages.MaskProduct):
            self._dealt.append(Dealt(group, header.seed, header.first, header.count))

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        """See ``ClientTransport.allocate``. What is written to a slot is recorded when it is sent."""
        return self._link.allocate(size, kept=kept)

    def discard(self, slot: memoryview) -> None:
        """See ``ClientTransport.discard``."""
        self._link.discard(slot)

    def receive(self, timeout_s: float) -> Delivery:
        """See ``ClientTransport.receive``."""
        return self._link.receive(timeout_s)

    def close(self) -> None:
        """See ``ClientTransport.close``."""
        self._link.close()

    def recording(self) -> Recording:
        """Return what has been sent so far."""
        return Recording(self._observer, tuple(self._seen), tuple(self._dealt))


class Recorder:
    """Makes recording links, one for each peer of a run; hand ``wrap`` to ``tsqp.levels.runnable``.

    Args:
        groups: keep only these linear groups' tensors; None keeps all.
    """

    def __init__(self, groups: frozenset[str] | None = None) -> None:
        self._groups = groups
        self._links: dict[str, RecordingTransport] = {}

    def wrap(self, observer: str) -> Callable[[ClientTransport], ClientTransport]:
        """Return what wraps the link to a peer of that name."""

        def wrapped(link: ClientTransport) -> ClientTransport:
            self._links[observer] = RecordingTransport(link, observer, self._groups)
            return self._links[observer]

        return wrapped

    def recording(self, observer: str) -> Recording:
        """Return what the link to a peer carried.

        Raises:
            InputError: no link was opened to it.
        """
        if observer not in self._links:
            raise InputError(f"nothing was recorded: no link to {observer} was opened.")
        return self._links[observer].recording()

    def others(self, observer: str) -> tuple[Recording, ...]:
        """Return what all links but one carried, in the order of their opening."""
        return tuple(link.recording() for name, link in self._links.items() if name != observer)
