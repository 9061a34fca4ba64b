"""``OpenOps``: what the worker is sent, what is accepted from it, and every wrong tensor refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from plain_link import PlainLink
from torch import Tensor

from tsqp.enclave.remote_ops import OpenOps
from tsqp.enclave.session import Session
from tsqp.errors import ProtocolError
from tsqp.model.architecture import chains, norm_shapes, parse_config
from tsqp.transport.base import Buffer, Delivery
from tsqp.wire import codec, int8_rows, messages
from tsqp.wire.codec import RequestFrames
from tsqp.wire.messages import AnyReply, TensorSpec

CONFIG = parse_config(
    {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    },
    "test",
)
CHAIN, LAST_CHAIN = chains(CONFIG)
Answer = Callable[[RequestFrames], list[bytes]]


class AnsweringTransport(PlainLink):
    """A worker in memory that answers each request with a function."""

    peer = "gpu.example:50051"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[RequestFrames] = []
        self.released = 0

    def send(self, frames: Sequence[Buffer]) -> None:
        # Copied, as a real link would: the caller may reuse its buffers once the reply has come.
        self.asked.append(codec.decode_request([bytes(frame) for frame in frames]))

    def receive(self, timeout_s: float) -> Delivery:
        assert timeout_s > 0
        return Delivery(self.answer(self.asked[-1]), release=self._release)

    def _release(self) -> None:
        self.released += 1

    def close(self) -> None:
        pass


def packed(reply: AnyReply, *tensors: Tensor) -> list[bytes]:
    return [messages.encode(reply), *(bytes(codec.frame_of(x)) for x in tensors)]


def answering(y: Tensor, spec: TensorSpec | None = None, copies: int = 1) -> Answer:
    """Answer with a tensor, under its own spec or a false one."""
    reply_spec = spec or codec.spec_of(y)
    return lambda request: packed(messages.Result(id=request.header.id, y=reply_spec, compute_ns=1), *[y] * copies)


def ops_with(answer: Answer, wire_dtype: torch.dtype = torch.float32) -> tuple[OpenOps, AnsweringTransport]:
    worker = AnsweringTransport(answer)
    return OpenOps(Session(worker, 30.0), CONFIG, wire_dtype), worker


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_sends_the_group_and_activations_in_the_wire_dtype(dtype: torch.dtype) -> None:
    y_MN = torch.arange(24.0).view(1, 24).to(dtype)
    ops, worker = ops_with(answering(y_MN), dtype)
    x_MK = torch.arange(8.0).view(8, 1).T
    came = ops.linear("layers.0.qkv", x_MK)()
    assert came.dtype == torch.float32
    assert torch.equal(came, y_MN.float())
    (asked,) = worker.asked
    assert asked.header == messages.Linear(id=1, group="layers.0.qkv", x=TensorSpec(codec.dtype_name(dtype), (1, 8)))
    assert torch.equal(asked.tensors[0], x_MK.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_chain_sends_the_residual_stream_beside_the_activations(dtype: torch.dtype, rows: int) -> None:
    y = torch.arange(float(rows * 48)).view(rows, 48).to(dtype)
    ops, worker = ops_with(answering(y), dtype)
    x_MK, residual_MD = torch.arange(rows * 8.0).view(8, rows).T, torch.arange(rows * 8.0).view(rows, 8)
    sent = residual_MD.clone()
    pending = ops.linear_chain(LAST_CHAIN, x_MK, residual_MD)
    assert torch.equal(residual_MD, sent), "the products come later"
    last = pending()
    assert (last.dtype, last.is_contiguous()) == (torch.float32, True)
    assert torch.equal(last, y[:, 16:].float())
    assert torch.equal(residual_MD, sent + y[:, :8].float() + y[:, 8:16].float())
    (asked,) = worker.asked
    spec = TensorSpec(codec.dtype_name(dtype), (rows, 16))
    assert asked.header == messages.LinearChain(id=1, groups=LAST_CHAIN, x=spec)
    assert torch.equal(asked.tensors[0], torch.cat((x_MK, sent), dim=1).to(dtype))


def test_as_int8_the_residual_stream_goes_out_as_bfloat16_and_each_part_has_scales_of_its_own() -> None:
    """A stream of a few large values among small ones, in int8 under one scale, would come out as zeros."""
    y = torch.cat((torch.full((3, 8), 1e-3), torch.full((3, 8), 1e3), torch.ones(3, 32)), dim=1)
    ops, worker = ops_with(answering(int8_rows.encode_parts(y, (8, 8, 32))), torch.int8)
    x_MK, residual_MD = torch.arange(24.0).view(3, 8), torch.tensor([1e4, 0.01] * 12).view(3, 8)
    sent = residual_MD.clone()
    last = ops.linear_chain(LAST_CHAIN, x_MK, residual_MD)()
    assert last.dtype == torch.float32
    torch.testing.assert_close(last, y[:, 16:])
    torch.testing.assert_close(residual_MD, sent + y[:, :8] + y[:, 8:16])
    (asked,) = worker.asked
    assert asked.header == messages.LinearChain(id=1, groups=LAST_CHAIN, x=TensorSpec("int8", (3, 8 + 4 + 2 * 8)))
    expected = torch.cat((int8_rows.decode(int8_rows.encode(x_MK)), sent.bfloat16().float()), dim=1)
    assert torch.equal(int8_rows.decode_beside(asked.tensors[0], hidden=8), expected)


def test_embedding_sends_ids_and_asks_for_the_wire_dtype() -> None:
    y_MD = torch.arange(24.0).view(3, 8).half()
    ops, worker = ops_with(answering(y_MD), torch.float16)
    ids_M = torch.tensor([3, 9, 1, 9, 31])[::2]
    assert torch.equal(ops.embedding(ids_M)(), y_MD.float())
    (asked,) = worker.asked
    assert asked.header == messages.Embedding(id=1, ids=TensorSpec("int64", (3,)), dtype="float16")
    assert asked.tensors[0].tolist() == [3, 1, 31]


def test_matmul_sends_both_operands_in_row_order() -> None:
    y = torch.arange(20.0).view(2, 2, 5)
    ops, worker = ops_with(answering(y))
    a, b = torch.rand(2, 3, 2).transpose(1, 2), torch.rand(2, 5, 3).transpose(1, 2)
    assert torch.equal(ops.matmul(a, b), y)
    (asked,) = worker.asked
    assert asked.header == messages.MatMul(id=1, a=TensorSpec("float32", (2, 2, 3)), b=TensorSpec("float32", (2, 3, 5)))
    assert torch.equal(asked.tensors[0], a)
    assert torch.equal(asked.tensors[1], b)


OPERATIONS = ("linear", "linear_chain", "embedding", "matmul", "state")


class SharedTransport(AnsweringTransport):
    """One whose replies lie in memory that the worker changes as soon as it has it back."""

    def receive(self, timeout_s: float) -> Delivery:
        header, *tensors = super().receive(timeout_s).frames
        shared = [bytearray(frame) for frame in tensors]

        def release() -> None:
            self._release()
            for memory in shared:
                memory[:] = b"\x55" * len(memory)

        return Delivery([header, *[memoryview(each) for each in shared]], shared=True, release=release)


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        *product(OPERATIONS, (torch.float32, torch.bfloat16, torch.float16)),
        *product(("linear", "linear_chain", "embedding", "state"), (torch.int8,)),  # attention's products are no rows
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_results_are_copied_out_of_memory_that_the_worker_can_change(
    operation: str, dtype: torch.dtype, rows: int
) -> None:
    """Of one row, a part of a wider one is contiguous, and could be taken as it lies."""
    x_MK, ids_M = torch.arange(8.0 * rows).view(rows, 8), torch.tensor([1, 2])[:rows]
    columns = {"linear": 24, "linear_chain": 40, "embedding": 8, "matmul": 3, "state": 0}[operation]
    y_MN = torch.arange(float(rows * columns)).view(rows, columns)
    state = {name: torch.rand(shape) for name, shape in norm_shapes(CONFIG).items()}
    sizes = (8, 8, 24) if operation == "linear_chain" else (columns,)
    sent = int8_rows.encode_parts(y_MN, sizes) if dtype == torch.int8 and columns else y_MN.to(dtype)
    worker = SharedTransport(state_answer(state) if operation == "state" else answering(sent))
    ops = OpenOps(Session(worker, 30.0), CONFIG, dtype)
    expected = sent.float()
    if dtype == torch.int8 and columns:
        parts = sent.split([size + 4 for size in sizes], dim=1)
        expected = torch.cat([int8_rows.decode(part) for part in parts], dim=1)
    match operation:
        case "linear":
            assert torch.equal(ops.linear("layers.0.qkv", x_MK)(), expected)
        case "linear_chain":
            residual_MD = torch.zeros(rows, 8)
            pending = ops.linear_chain(CHAIN, x_MK, residual_MD)
            assert torch.equal(pending(), expected[:, 16:])
            assert torch.equal(residual_MD, expected[:, :8] + expected[:, 8:16])
        case "embedding":
            assert torch.equal(ops.embedding(ids_M)(), expected)
        case "matmul":
            assert torch.equal(ops.matmul(x_MK, torch.ones(8, 3)), expected)
        case _:
            came = ops.state()
            assert all(torch.equal(came[name], value) for name, value in state.items())
    assert worker.released == 1


HONEST = torch.zeros(2, 24)
HOSTILE: dict[str, Answer] = {
    "one row short": answering(torch.zeros(1, 24)),
    "one column more": answering(torch.zeros(2, 25)),
    "transposed": answering(torch.zeros(24, 2)),
    "flat": answering(torch.zeros(48)),
    "extra axis": answering(torch.zeros(1, 2, 24)),
    "other dtype": answering(HONEST.half()),
    "other dtype of equal size": answering(torch.zeros(2, 12, dtype=torch.int64), TensorSpec("int64", (2, 12))),
    "short frame": answering(torch.zeros(47), TensorSpec("float32", (2, 24))),
    "long frame": answering(torch.zeros(49), TensorSpec("float32", (2, 24))),
    "empty frame": answering(torch.zeros(0), TensorSpec("float32", (2, 24))),
    "no frame": answering(HONEST, copies=0),
    "two frames": answering(HONEST, copies=2),
    "a huge promise": answering(HONEST, TensorSpec("float32", (2**31, 2**31))),
    "another kind": lambda request: packed(messages.StateResult(id=request.header.id, names=(), tensors=()), HONEST),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_product_is_refused(name: str) -> None:
    ops, worker = ops_with(HOSTILE[name])
    with pytest.raises(ProtocolError, match=r"linear layers\.0\.qkv (from|at) gpu\.example:50051"):
        ops.linear("layers.0.qkv", torch.zeros(2, 8))()
    assert worker.released, "shared memory that is never given back would fill up"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_chain_is_refused_and_the_residual_stream_left_alone(name: str) -> None:
    ops, worker = ops_with(HOSTILE[name])
    residual_MD = torch.ones(2, 8)
    pending = ops.linear_chain(CHAIN, torch.zeros(2, 8), residual_MD)
    with pytest.raises(ProtocolError, match=r"linear layers\.0\.o to layers\.1\.qkv (from|at) gpu\.example:50051"):
        pending()
    assert worker.released
    assert torch.equal(residual_MD, torch.ones(2, 8))


def test_a_chain_that_cannot_be_sent_gives_back_its_room() -> None:
    ops, worker = ops_with(answering(torch.ones(2, 40)))
    given, discarded = memoryview(bytearray(4 * 2 * 16)), list[memoryview]()
    worker.allocate = lambda _size, *, kept=False: given  # type: ignore[method-assign, assignment]  # noqa: ARG005
    worker.discard = discarded.append  # type: ignore[method-assign, assignment]
    with pytest.raises(NotImplementedError):
        ops.linear_chain(CHAIN, torch.ones(2, 8), torch.ones(2, 8, device="meta"))
    assert [id(slot) for slot in discarded] == [id(given)]
    assert not worker.asked


def test_embedding_and_matmul_refuse_other_shapes_too() -> None:
    ops, _ = ops_with(answering(torch.zeros(3, 9)))
    with pytest.raises(ProtocolError, match=r"embedding from gpu.*expected float32 \[3, 8\], got float32 \[3, 9\]"):
        ops.embedding(torch.tensor([1, 2, 3]))()
    with pytest.raises(ProtocolError, match=r"matmul from gpu.*expected float32 \[3, 5\], got float32 \[3, 9\]"):
        ops.matmul(torch.zeros(3, 2), torch.zeros(2, 5))


def state_answer(state: dict[str, Tensor]) -> Answer:
    specs = tuple(map(codec.spec_of, state.values()))
    return lambda request: packed(
        messages.StateResult(id=request.header.id, names=tuple(state), tensors=specs), *state.values()
    )


def honest_state() -> dict[str, Tensor]:
    return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(norm_shapes(CONFIG).items())}


def test_state_returns_the_norm_weights() -> None:
    ops, worker = ops_with(state_answer(honest_state()))
    came = ops.state()
    assert worker.asked[0].header == messages.State(id=1)
    assert came.keys() == norm_shapes(CONFIG).keys()
    assert all(torch.equal(came[name], value) for name, value in honest_state().items())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("model.norm.weight"),
        lambda state: state.update({"model.extra.weight": torch.zeros(8)}),
        lambda state: state.update({"model.norm.weight": torch.zeros(9)}),
        lambda state: state.update({"model.norm.weight": torch.zeros(1, 8)}),
        lambda state: state.update({"model.norm.weight": torch.zeros(8).half()}),
    ],
    ids=["missing", "extra", "longer", "extra axis", "other dtype"],
)
def test_a_hostile_state_is_refused(change: Callable[[dict[str, Tensor]], object]) -> None:
    state = honest_state()
    change(state)
    ops, _ = ops_with(state_answer(state))
    with pytest.raises(ProtocolError, match=r"gpu\.example:50051: not the norm weights of this model"):
        ops.state()


def test_an_operand_that_cannot_be_sent_gives_back_the_room_of_those_before_it() -> None:
    ops, worker = ops_with(answering(torch.ones(2, 2)))
    given: list[memoryview] = []

    def allocate(size: int, *, kept: bool = False) -> memoryview:
        assert not kept
        given.append(memoryview(bytearray(size)))
        return given[-1]

    discarded: list[memoryview] = []
    worker.allocate, worker.discard = allocate, discarded.append  # type: ignore[method-assign, assignment]
    with pytest.raises(NotImplementedError):
        ops.matmul(torch.ones(2, 3), torch.ones(3, 2, device="meta"))
    assert {id(slot) for slot in discarded} == {id(slot) for slot in given}
    assert len(given) == 2
    assert not worker.asked
