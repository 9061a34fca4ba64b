"""What a worker and a dealer do with any message: a tiny model behind the dispatcher, of each of the three services."""

from __future__ import annotations

from functools import cache

import msgspec

from fuzz import codec, framing, models
from tsqp.transport.base import Incoming
from tsqp.wire import messages
from tsqp.wire.messages import AnyReply
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.products import compute

# A product of more rows is admitted and not computed: it only takes long.
_MOST_ROWS = 256
_reply = msgspec.msgpack.Decoder(AnyReply).decode


def run(data: bytes) -> None:
    """Give the messages to the service that the first byte names."""
    kind, found = framing.unpack(data)
    for frames in found:
        _answer(_dispatchers()[kind % 3], frames)


def _answer(dispatcher: Dispatcher, frames: list[bytes]) -> None:
    replies: list[AnyReply] = []
    incoming = Incoming(tuple(frames), legacy=False, reply=lambda reply: replies.append(_reply(reply[0])))
    waiting = dispatcher.admit(incoming)
    if waiting:
        count = getattr(waiting.header, "count", 0)
        if isinstance(count, int) and count > _MOST_ROWS:
            return
        dispatcher.finish(compute(dispatcher.service, [waiting]))
    (reply,) = replies
    if isinstance(reply, messages.Failure) and reply.code == "internal":
        raise AssertionError("the worker failed on a request.")


@cache
def _dispatchers() -> tuple[Dispatcher, ...]:
    services = (models.open_service(), models.exact_service(), models.dealer_service())
    return tuple(Dispatcher(service, "tiny", "d" * 64) for service in services)


mutated = framing.mutated


def seeds() -> dict[str, bytes]:
    """Return requests that the tiny model can carry out."""
    group = "layers.0.qkv"
    x, residual = messages.TensorSpec("float32", (2, 8)), messages.TensorSpec("float32", (2, 16))
    rows, codes = messages.TensorSpec("int8", (2, 12)), messages.TensorSpec("int32", (2, 8))
    chain = ("layers.0.o", "layers.0.gate_up", "layers.0.down", "head")
    ids = messages.TensorSpec("int64", (2,))
    requests: dict[str, tuple[int, messages.AnyRequest, list[bytes]]] = {
        "hello": (0, messages.Hello(id=1, software="tsqp 3"), []),
        "linear": (0, messages.Linear(id=2, group=group, x=x), [bytes(64)]),
        "linear-int8": (0, messages.Linear(id=3, group="head", x=rows), [bytes(24)]),
        "chain": (0, messages.LinearChain(id=4, groups=chain, x=residual), [bytes(128)]),
        "chain-int8": (
            0,
            messages.LinearChain(id=5, groups=chain, x=messages.TensorSpec("int8", (2, 28))),
            [bytes(56)],
        ),
        "embedding": (0, messages.Embedding(id=6, ids=ids, dtype="float16"), [bytes(16)]),
        "matmul": (0, messages.MatMul(id=7, a=x, b=messages.TensorSpec("float32", (8, 2))), [bytes(64), bytes(64)]),
        "state": (0, messages.State(id=8), []),
        "stats": (1, messages.Stats(id=9), []),
        "exact": (1, messages.LinearExact(id=10, group=group, x=codes), [bytes(64)]),
        "codes": (1, messages.Codes(id=11, group=group, first=1, rows=4), []),
        "masks": (2, messages.MaskProduct(id=12, group=group, seed=bytes(32), first=7, count=2), []),
    }
    own = {
        name: framing.pack(kind, [[messages.encode(header), *frames]])
        for name, (kind, header, frames) in requests.items()
    }
    return {**own, "another-version": codec.seeds()["another-version"]}
