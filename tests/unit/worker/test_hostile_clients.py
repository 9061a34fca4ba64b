"""Both dispatchers answer any request at all; none ends the worker."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import load_linears, tiny_checkpoint
from torch import Tensor

from tsqp.model.linears import Linears
from tsqp.transport.base import Client, Incoming
from tsqp.wire import codec, messages
from tsqp.worker.clients import Limits
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.legacy import LegacyDispatcher
from tsqp.worker.products import compute
from tsqp.worker.services import OpenService

LAST = "model.layers.2.post_attention_layernorm.weight"
STATE: dict[str, Tensor] = {"model.norm.weight": torch.ones(48), LAST: torch.ones(48)}
CHAIN = ("layers.2.o", "layers.2.gate_up", "layers.2.down", "head")
MODULES = ["lm_head", "model.embed_tokens", "model.layers.0.self_attn.k_proj", "no.such"]
unhurried = settings(deadline=None)
dtypes = st.sampled_from(list(codec.TORCH_DTYPES))
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 48, 52, 96, 148]), max_size=3).map(tuple)


@pytest.fixture(scope="module")
def linears(tmp_path_factory: pytest.TempPathFactory) -> Linears:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(directory)
    return load_linears(directory)


def zeros(dtype: str, shape: tuple[int, ...]) -> bytes:
    return bytes(math.prod(shape) * codec.TORCH_DTYPES[dtype].itemsize)


def answer(linears: Linears, frames: list[bytes]) -> Any:
    reply, _ = codec.decode_reply(Dispatcher(OpenService(linears, STATE), "tiny", "digest").answer(frames))
    return reply


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["torch", "python"]
)
@pytest.mark.parametrize("where", ["operand", "multiply", "result"])
def test_memory_that_lacks_around_a_product_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, linears: Linears, where: str, error: Exception
) -> None:
    def full(*_: Any) -> Tensor:
        raise error

    monkeypatch.setattr(OpenService, where, full)
    monkeypatch.setattr(OpenService, "sends_products", lambda *_: False)
    header = messages.Linear(id=1, group="head", x=messages.TensorSpec("float32", (1, 48)))
    reply = answer(linears, [messages.encode(header), zeros("float32", (1, 48))])
    assert isinstance(reply, messages.Failure)
    assert reply.code == "memory"
    assert "cpu is out of memory" in reply.message


def test_clients_of_the_first_protocol_are_bounded_too(linears: Linears) -> None:
    """How many there are, and what they leave unread; they are told so in their own words."""
    dispatcher = Dispatcher(OpenService(linears, {}), "tiny", "digest", Limits(clients=1))
    answers = []
    for client in (Client(), Client()):
        reply = lambda frames: answers.append(msgspec.msgpack.decode(frames[0]))  # noqa: E731
        incoming = Incoming((b"old",), legacy=True, reply=reply, client=client)
        dispatcher.pass_on(incoming, lambda _frames: [msgspec.msgpack.encode({"status": "ok"})])
    assert answers[0] == {"status": "ok"}
    assert answers[1]["status"] == "error"
    assert "--max-clients" in answers[1]["error"]
    assert dispatcher.stats().refused == 1


def legacy_answer(linears: Linears, method: str, body: dict[str, Any]) -> Any:
    frame = msgspec.msgpack.encode({"method": method, "request": body})
    (reply,) = LegacyDispatcher(linears, STATE).answer([frame])
    return msgspec.msgpack.decode(reply)


@unhurried
@given(dtype=dtypes, a=shapes, b=shapes, as_dtype=dtypes, group=st.sampled_from(["head", "layers.0.qkv", "x"]))
def test_any_product_gives_a_result_or_a_failure(
    linears: Linears, dtype: Any, a: Any, b: Any, as_dtype: Any, group: str
) -> None:
    left, right = messages.TensorSpec(dtype, a), messages.TensorSpec(dtype, b)
    for header, frames in [
        (messages.Linear(id=1, group=group, x=left), [zeros(dtype, a)]),
        (messages.LinearChain(id=1, groups=CHAIN, x=left), [zeros(dtype, a)]),
        (messages.LinearChain(id=1, groups=(*CHAIN[:3], group), x=left), [zeros(dtype, a)]),
        (messages.Embedding(id=1, ids=left, dtype=as_dtype), [zeros(dtype, a)]),
        (messages.MatMul(id=1, a=left, b=right), [zeros(dtype, a), zeros(dtype, b)]),
    ]:
        reply = answer(linears, [messages.encode(header), *frames])
        assert isinstance(reply, messages.Result | messages.Failure)
        assert reply.id == 1
        assert not (isinstance(reply, messages.Failure) and reply.code == "internal"), reply.message


@unhurried
@given(frames=st.lists(st.binary(max_size=32), max_size=4))
def test_what_is_no_request_is_answered_with_a_failure(linears: Linears, frames: list[bytes]) -> None:
    assert isinstance(answer(linears, frames), messages.Failure)


@unhurried
@given(dtype=dtypes, a=shapes, b=shapes, module=st.sampled_from(MODULES))
@example(dtype="float32", a=(), b=(), module="lm_head")
def test_any_product_of_the_first_protocol_is_answered(
    linears: Linears, dtype: str, a: Any, b: Any, module: str
) -> None:
    stored = "float32" if dtype == "bfloat16" else dtype
    forward = {"module_name": module, "input_buffer": zeros(stored, a), "input_shape": a, "dtype": dtype}
    matmul = {
        "a_buffer": zeros(stored, a),
        "a_shape": a,
        "b_buffer": zeros(stored, b),
        "b_shape": b,
        "dtype": dtype,
    }
    for reply in (legacy_answer(linears, "Forward", forward), legacy_answer(linears, "Matmul", matmul)):
        assert reply["status"] in {"success", "error"}


def matmul(linears: Linears, a: tuple[int, ...], b: tuple[int, ...], *frames: bytes) -> Any:
    left, right = messages.TensorSpec("float32", a), messages.TensorSpec("float32", b)
    return answer(linears, [messages.encode(messages.MatMul(id=1, a=left, b=right)), *frames])


def test_a_few_bytes_cannot_ask_for_a_result_that_no_message_holds(linears: Linears) -> None:
    column = zeros("float32", (1 << 16, 1))
    reply = matmul(linears, (1 << 16, 1), (1, 1 << 16), column, column)
    assert isinstance(reply, messages.Failure)
    assert reply.code == "input"
    assert "at most" in reply.message


def test_operands_without_elements_are_refused(linears: Linears) -> None:
    """Their result could still be as large as the shape says: 2^31 by 2^31 once overflowed inside torch."""
    reply = matmul(linears, (1 << 31, 0), (0, 1 << 31), b"", b"")
    assert isinstance(reply, messages.Failure)
    assert "an operand is empty" in reply.message


def test_no_rows_have_a_result_of_no_rows(linears: Linears) -> None:
    """The fuzzer found that this was answered as a bug of the worker's: the result had strides that no kernel takes."""
    spec = messages.TensorSpec("float32", (0, 48))
    reply = answer(linears, [messages.encode(messages.Linear(id=1, group="layers.0.qkv", x=spec)), b""])
    assert isinstance(reply, messages.Result)
    assert reply.y == messages.TensorSpec("float32", (0, 80))


def test_a_bug_fails_the_request_and_not_the_worker(
    linears: Linears, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(a: Tensor, b: Tensor) -> Tensor:
        raise ZeroDivisionError(f"{a.shape} {b.shape}")

    monkeypatch.setattr(linears, "matmul", broken)
    reply = matmul(linears, (1, 1), (1, 1), bytes(4), bytes(4))
    assert isinstance(reply, messages.Failure)
    assert reply.code == "internal"
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivisionError" not in reply.message


def test_requests_of_one_id_get_each_its_own_answer(linears: Linears) -> None:
    """Ids are the client's affair: a worker keeps nothing by them, also where it multiplies requests together."""
    service = OpenService(linears, STATE)
    dispatcher = Dispatcher(service, "tiny", "digest")
    replies: list[list[codec.Buffer]] = []
    waiting = []
    inputs = [torch.full((rows, 48), float(rows)) for rows in (1, 2, 3)]
    for x in inputs:
        header = messages.Linear(id=7, group="layers.0.qkv", x=codec.spec_of(x))
        sent = (messages.encode(header), bytes(codec.frame_of(x)))
        admitted = dispatcher.admit(Incoming(sent, legacy=False, reply=lambda reply: replies.append(list(reply))))
        assert admitted is not None
        waiting.append(admitted)
    dispatcher.finish(compute(service, waiting))
    for x, frames_of_reply in zip(inputs, replies, strict=True):
        reply, frames = codec.decode_reply(frames_of_reply)
        assert isinstance(reply, messages.Result)
        assert reply.id == 7
        y = codec.claim(reply, frames, messages.TensorSpec("float32", (len(x), 80)), "linear").unverified()
        assert torch.allclose(y, linears.linear("layers.0.qkv", x), atol=1e-5)


def test_a_long_model_path_is_shown_by_its_last_part(linears: Linears) -> None:
    dispatcher = Dispatcher(OpenService(linears, STATE), "/long" * 100 + "/my-model", "digest")
    reply, _ = codec.decode_reply(dispatcher.answer([messages.encode(messages.Hello(id=1, software="test"))]))
    assert isinstance(reply, messages.Welcome)
    assert reply.model == "my-model"
