"""A message of at most 100 bytes makes no process allocate more than 1 MB, whatever sizes it names.

What is counted is what Python and NumPy allocate (tracemalloc) and the results of PyTorch's operations.
"""

from __future__ import annotations

import contextlib
import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fuzz import codec as codec_target
from fuzz import framing, models
from tsqp.errors import ProtocolError
from tsqp.transport import datagrams
from tsqp.wire import codec, messages
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.legacy import LegacyDispatcher

SMALL_BYTES, LIMIT_BYTES = 100, 1 << 20
HUGE = (0, 1, 2, 1 << 10, 1 << 15, 1 << 20, 1 << 24, 1 << 30, 1 << 31)
unhurried = settings(deadline=None, max_examples=60)


class Allocated(TorchDispatchMode):
    """Adds up the memory of what operations return, each piece once; all of it is kept, so that none is used again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pieces: dict[int, torch.UntypedStorage] = {}

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes() for piece in self._pieces.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                piece = tensor.untyped_storage()
                self._pieces[piece.data_ptr()] = piece
        return result


def allocated_bytes(act: Callable[[], object]) -> int:
    """Return how many bytes an action allocates: at most at once by Python, and in all by PyTorch."""
    tracemalloc.start()
    try:
        with Allocated() as counted:
            act()
        return tracemalloc.get_traced_memory()[1] + int(counted.bytes)
    finally:
        tracemalloc.stop()


def refused_or_read(decode: Callable[[], object]) -> Callable[[], None]:
    def act() -> None:
        with contextlib.suppress(ProtocolError):
            decode()

    return act


@pytest.fixture(scope="module")
def dispatchers() -> tuple[Dispatcher, ...]:
    services = (models.open_service(), models.exact_service(), models.dealer_service())
    return tuple(Dispatcher(service, "tiny", "d" * 64) for service in services)


def named_sizes() -> Iterator[dict[str, Any]]:
    """Yield requests that name sizes far beyond the frames that come with them."""
    for rows, columns in itertools.product(HUGE, HUGE):
        spec = {"dtype": "float32", "shape": [rows, columns]}
        turned = {"dtype": "float32", "shape": [columns, rows]}
        yield {"op": "linear", "group": "head", "x": spec}
        yield {"op": "linear", "group": "head", "x": {**spec, "dtype": "int8"}}
        yield {"op": "linear_exact", "group": "head", "x": {**spec, "dtype": "int32"}}
        yield {"op": "matmul", "a": spec, "b": turned}
        yield {"op": "embedding", "ids": {"dtype": "int64", "shape": [rows]}, "dtype": "float32"}
        yield {"op": "codes", "group": "head", "first": columns, "rows": rows}


def sent(request: dict[str, Any]) -> list[bytes]:
    frames = sum(name in request for name in ("x", "a", "b", "ids"))
    return [msgspec.msgpack.encode({"v": 3, "id": 1, **request}), *[b""] * frames]


def test_the_measure_sees_all_kinds_of_memory() -> None:
    """A test that measures nothing would pass."""
    assert allocated_bytes(lambda: bytearray(3 << 20)) > 3 << 20
    assert allocated_bytes(lambda: torch.empty(3 << 20, dtype=torch.int8)) >= 3 << 20
    assert allocated_bytes(lambda: codec.empty(messages.TensorSpec("int8", (3 << 20,)))) >= 3 << 20
    assert allocated_bytes(lambda: None) < LIMIT_BYTES // 2


def test_sizes_that_are_named_are_not_allocated(dispatchers: tuple[Dispatcher, ...]) -> None:
    for request in named_sizes():
        frames = sent(request)
        if sum(map(len, frames)) > SMALL_BYTES:
            continue
        for dispatcher in dispatchers:
            assert allocated_bytes(lambda: dispatcher.answer(frames)) < LIMIT_BYTES, request  # noqa: B023


@pytest.mark.parametrize("change", [-1, 0, 1, 1 << 12, (1 << 31) - (1 << 20)])
@pytest.mark.parametrize("group", ["layers.0.qkv", "layers.0.down", "head"])
def test_what_is_asked_for_in_few_bytes_is_little(dispatchers: tuple[Dispatcher, ...], group: str, change: int) -> None:
    """Rows of codes, and mask rows, of which a dealer makes products: as many as may be asked for, and others."""
    shape = dispatchers[1].service.groups[group]
    codes = messages.most_code_rows(shape.in_features) + change
    masks = messages.most_mask_rows(shape.in_features, shape.rows) + change
    asked = (
        (dispatchers[1], messages.Codes(id=1, group=group, first=0, rows=codes)),
        (dispatchers[1], messages.Codes(id=1, group=group, first=0, rows=shape.rows)),
        (dispatchers[2], messages.MaskProduct(id=1, group=group, seed=bytes(32), first=0, count=masks)),
    )
    for dispatcher, header in asked:
        frames: list[bytes] = [messages.encode(header)]
        assert allocated_bytes(lambda: dispatcher.answer(frames)) < LIMIT_BYTES  # noqa: B023


@unhurried
@given(frames=st.lists(st.binary(max_size=30), max_size=3))
def test_any_small_request_or_reply_is_read_in_little_memory(frames: list[bytes]) -> None:
    act = refused_or_read(lambda: codec.decode_request(frames))
    assert allocated_bytes(act) < LIMIT_BYTES
    assert allocated_bytes(refused_or_read(lambda: codec.decode_reply(frames))) < LIMIT_BYTES
    assert allocated_bytes(lambda: codec_target.run(framing.pack(1, [frames]))) < LIMIT_BYTES


# MessagePack that announces 2^32 - 1 elements of an array or a map, or as many bytes.
ANNOUNCED = [bytes([kind]) + b"\xff" * 4 for kind in (0xC6, 0xDB, 0xDD, 0xDF)]


@pytest.mark.parametrize("announced", ANNOUNCED, ids=["bin", "str", "array", "map"])
def test_lengths_that_are_announced_are_not_allocated(dispatchers: tuple[Dispatcher, ...], announced: bytes) -> None:
    legacy = LegacyDispatcher(models.open_linears(), models.open_service().state)
    starts = (
        b"",
        b"\x82\xa6method\xa7Forward\xa7request",
        b"\x82\xa6method\xaeRegisterClient\xa7request\x81\xacmodule_names",
        b"\x83\xa2op\xa5state\xa1v\x03\xa2id",
        b"\x84\xa2id\x01\xa4kind\xa5state\xa7tensors\x90\xa5names",
        b"\x82\xa2id\x01\xa6groups",
    )
    for start in starts:
        message = start + announced
        assert allocated_bytes(lambda: legacy.answer([message])) < LIMIT_BYTES  # noqa: B023
        assert allocated_bytes(lambda: dispatchers[0].answer([message])) < LIMIT_BYTES  # noqa: B023
        assert allocated_bytes(refused_or_read(lambda: codec.decode_reply([message]))) < LIMIT_BYTES  # noqa: B023


def test_shapes_of_the_first_protocol_are_not_allocated() -> None:
    legacy = LegacyDispatcher(models.open_linears(), models.open_service().state)
    for shape in itertools.product(HUGE, HUGE):
        body = {"module_name": "lm_head", "input_buffer": b"", "input_shape": list(shape), "dtype": "float32"}
        frame = msgspec.msgpack.encode({"method": "Forward", "request": body})
        assert allocated_bytes(lambda: legacy.answer([frame])) < LIMIT_BYTES, shape  # noqa: B023


@unhurried
@given(numbers=st.lists(st.sampled_from([0, 1, 2, 1 << 12, 1 << 20, 1 << 40, (1 << 64) - 1]), max_size=12))
def test_any_small_datagram_is_read_in_little_memory(numbers: list[int]) -> None:
    half = memoryview(bytearray(4096))
    raw = b"".join(number.to_bytes(8, "little") for number in numbers)
    assert allocated_bytes(refused_or_read(lambda: datagrams.read(memoryview(raw), half))) < LIMIT_BYTES
