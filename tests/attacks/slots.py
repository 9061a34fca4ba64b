"""Links whose messages and slots are noted, and an honest worker for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hostile import Material
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tsqp.transport.base import Buffer, ClientTransport, Delivery
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint

LIMIT_BYTES = 1 << 20
# Long enough that its tensors do not travel in datagrams.
IDS = torch.arange(128).view(1, 128) * 7 % 101


class Journal:
    """A link that keeps every frame as it was when it was sent; ``before`` is called with a message first.

    Args:
        link: the link it wraps.
        before: may return other frames to send in place of these.
    """

    def __init__(self, link: ClientTransport, before: Callable[[ClientTransport, list[Buffer]], list[Buffer]]) -> None:
        self._link = link
        self._before = before
        self.sent: list[bytes] = []
        self.slots = 0
        self.peer = link.peer

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        slot = self._link.allocate(size, kept=kept)
        self.slots += slot is not None
        return slot

    def discard(self, slot: memoryview) -> None:
        self._link.discard(slot)

    def send(self, frames: Sequence[Buffer]) -> None:
        frames = self._before(self._link, list(frames))
        self.sent += [bytes(frame) for frame in frames]
        self._link.send(frames)

    def receive(self, timeout_s: float) -> Delivery:
        return self._link.receive(timeout_s)

    def close(self) -> None:
        self._link.close()


def unchanged(_link: ClientTransport, frames: list[Buffer]) -> list[Buffer]:
    return frames


@contextmanager
def worker(material: Material, endpoint: Endpoint) -> Iterator[None]:
    """Serve honestly from a thread."""
    server, dispatcher, stopping = Server([endpoint], LIMIT_BYTES), material.dispatcher(), threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            incoming = server.receive(0.05)
            if incoming:
                incoming.reply(dispatcher.answer(incoming.frames))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
        server.close()


class Slots:
    """How often each byte of each slot is stored to, and by what."""

    def __init__(self) -> None:
        self._counts: dict[int, npt.NDArray[np.int64]] = {}
        self._names: dict[int, list[str]] = {}
        self.ended: list[tuple[int, int, tuple[str, ...]]] = []

    def begin(self, slot: memoryview) -> None:
        self._counts[address_of(slot)] = np.zeros(len(slot), np.int64)
        self._names[address_of(slot)] = []

    def stored(self, tensor: Tensor, operation: str) -> None:
        """Count an operation that stores a tensor."""
        found = self.holding(tensor.data_ptr())
        if found is not None:
            assert tensor.is_contiguous()
            first = tensor.data_ptr() - found
            self._counts[found][first : first + tensor.numel() * tensor.itemsize] += 1
            self._names[found].append(operation)

    def holding(self, address: int) -> int | None:
        """Return the slot in which an address lies."""
        return next((at for at, counts in self._counts.items() if at <= address < at + len(counts)), None)

    def end(self, slot: memoryview) -> None:
        """Note how often the bytes of a slot were stored to, at least and at most, and watch it no longer."""
        counts = self._counts.pop(address_of(slot), None)
        if counts is not None:
            self.ended.append((int(counts.min()), int(counts.max()), tuple(self._names.pop(address_of(slot)))))


def address_of(slot: memoryview) -> int:
    return int(np.frombuffer(slot, np.uint8).ctypes.data)


class Counted(Journal):
    """A link whose slots are watched from when they are given until they are given again, or given back."""

    def __init__(self, link: ClientTransport, slots: Slots) -> None:
        super().__init__(link, unchanged)
        self._slots = slots

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        slot = super().allocate(size, kept=kept)
        if slot is not None:
            self._slots.end(slot)
            self._slots.begin(slot)
        return slot

    def discard(self, slot: memoryview) -> None:
        self._slots.end(slot)
        super().discard(slot)


class Stores(TorchDispatchMode):
    """Tells of every tensor that an operation of this thread stores to."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._slots = slots

    def __torch_dispatch__(
        self, func: Any, _types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        described = func._schema.arguments
        given = {each.name: value for each, value in zip(described, args, strict=False)} | kwargs
        for each in described:
            if each.alias_info is not None and each.alias_info.is_write and isinstance(given.get(each.name), Tensor):
                self._slots.stored(given[each.name], str(func))
        return func(*args, **kwargs)


class Kernels:
    """The native extension; none of its kernels may be given an address in a slot, to read or to store."""

    def __init__(self, extension: object, slots: Slots) -> None:
        self._extension, self._slots = extension, slots
        self.called: set[str] = set()

    def __getattr__(self, name: str) -> object:
        function: Any = getattr(self._extension, name)

        def checked(*arguments: float) -> object:
            self.called.add(name)
            inside = [at for at, each in enumerate(arguments) if isinstance(each, int) and self._slots.holding(each)]
            assert not inside, f"{name} was given a slot as argument {inside}"
            return function(*arguments)

        return checked
