"""The recorder: passes messages on, keeps what they say, and withholds token ids."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tsqp.audit.recorder import Recorder
from tsqp.errors import InputError
from tsqp.transport.base import Buffer, Delivery
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyRequest

SEED = bytes(range(32))
CHAIN = ("layers.0.o", "layers.0.gate_up", "layers.0.down", "layers.1.qkv")


class Link:
    """A link that keeps what it is given."""

    peer = "gpu.example:50051"

    def __init__(self) -> None:
        self.sent: list[list[Buffer]] = []
        self.discarded: list[memoryview] = []
        self.kept: list[bool] = []
        self.closed = False

    def send(self, frames: Sequence[Buffer]) -> None:
        self.sent.append(list(frames))

    def allocate(self, size: int, *, kept: bool = False) -> memoryview | None:
        self.kept.append(kept)
        return memoryview(bytearray(size))

    def discard(self, slot: memoryview) -> None:
        self.discarded.append(slot)

    def receive(self, timeout_s: float) -> Delivery:
        return Delivery([b"reply", str(timeout_s).encode()])

    def close(self) -> None:
        self.closed = True


def packed(header: AnyRequest, *tensors: Tensor) -> list[Buffer]:
    return [messages.encode(header), *(codec.frame_of(tensor) for tensor in tensors)]


def linear(group: str, x_MK: Tensor) -> list[Buffer]:
    return packed(messages.Linear(id=1, group=group, x=codec.spec_of(x_MK)), x_MK)


def test_it_passes_everything_on() -> None:
    inner, recorder = Link(), Recorder()
    link = recorder.wrap("worker")(inner)
    message = linear("head", torch.ones(2, 3))
    link.send(message)
    assert inner.sent == [message]
    assert link.receive(0.5).frames == [b"reply", b"0.5"]
    assert link.peer == inner.peer
    link.close()
    assert inner.closed


def test_slots_are_the_links_own_and_are_recorded_as_they_are_sent() -> None:
    inner, recorder = Link(), Recorder()
    link = recorder.wrap("worker")(inner)
    x_MK, spare = torch.tensor([[5, -7]], dtype=torch.int32), link.allocate(8, kept=True)
    slot = link.allocate(8)
    assert slot is not None
    assert spare is not None
    slot[:] = b"unsent.."
    slot[:] = codec.frame_of(x_MK)
    link.send([messages.encode(messages.LinearExact(id=1, group="head", x=codec.spec_of(x_MK))), slot])
    link.discard(spare)
    assert inner.sent[0][1] is slot
    assert inner.discarded == [spare]
    assert inner.kept == [True, False]
    slot[:] = b"reused.."
    assert torch.equal(recorder.recording("worker").first("head"), x_MK)


def test_it_keeps_copies_in_order() -> None:
    recorder = Recorder()
    link = recorder.wrap("worker")(Link())
    first, second = torch.randn(2, 3), torch.randint(-5, 5, (2, 3), dtype=torch.int32)
    kept = first.clone()
    link.send(linear("layers.0.o", first))
    exact = messages.LinearExact(id=2, group="layers.0.qkv", x=codec.spec_of(second))
    link.send(packed(exact, second))
    first.zero_()  # a caller may reuse its buffer once the reply has come
    recording = recorder.recording("worker")
    assert [(seen.operation, seen.group) for seen in recording.seen] == [
        ("linear", "layers.0.o"),
        ("linear_exact", "layers.0.qkv"),
    ]
    assert torch.equal(recording.first("layers.0.o"), kept)
    assert torch.equal(recording.first("layers.0.qkv"), second)
    with pytest.raises(InputError, match="holds nothing for 'head'"):
        recording.first("head")


@pytest.mark.parametrize("wanted", CHAIN)
def test_of_a_chain_any_group_is_enough(wanted: str) -> None:
    recorder = Recorder(frozenset({wanted}))
    link = recorder.wrap("worker")(Link())
    x_MC = torch.randn(2, 7)
    for groups in (CHAIN, ("layers.1.o", "layers.1.gate_up", "layers.1.down", "head")):
        link.send(packed(messages.LinearChain(id=1, groups=groups, x=codec.spec_of(x_MC)), x_MC))
    (seen,) = recorder.recording("worker").seen
    assert (seen.operation, seen.group) == ("linear_chain", "layers.0.o to layers.1.qkv")
    assert torch.equal(seen.tensor, x_MC)


def test_token_ids_are_withheld() -> None:
    recorder = Recorder()
    link = recorder.wrap("worker")(Link())
    ids = torch.tensor([5, 6, 7])
    link.send(packed(messages.Embedding(id=1, ids=codec.spec_of(ids), dtype="float32"), ids))
    link.send(packed(messages.State(id=2)))
    assert recorder.recording("worker").seen == ()


def test_both_operands_of_attention_are_kept() -> None:
    recorder = Recorder(frozenset({"layers.0.qkv"}))
    link = recorder.wrap("worker")(Link())
    a, b = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 3)
    link.send(packed(messages.MatMul(id=1, a=codec.spec_of(a), b=codec.spec_of(b)), a, b))
    link.send(linear("layers.1.qkv", torch.ones(1, 2)))
    recording = recorder.recording("worker")
    assert [torch.equal(x, y) for x, y in zip(recording.operands("matmul"), (a, b), strict=True)] == [True, True]
    assert len(recording.seen) == 2, "a group that was not asked for is dropped"


def test_a_dealers_orders_are_kept_and_its_seed_is_not_shown() -> None:
    recorder = Recorder()
    recorder.wrap("worker")(Link())
    link = recorder.wrap("dealer 1")(Link())
    link.send(packed(messages.MaskProduct(id=1, group="head", seed=SEED, first=4, count=9)))
    (dealer,) = recorder.others("worker")
    (order,) = dealer.dealt
    assert (order.group, order.seed, order.first, order.count) == ("head", SEED, 4, 9)
    assert repr(SEED) not in repr(dealer)
    assert dealer.observer == "dealer 1"


def test_a_link_that_was_never_opened_is_named() -> None:
    with pytest.raises(InputError, match="no link to dealer 2"):
        Recorder().recording("dealer 2")
