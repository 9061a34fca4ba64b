"""What of the CUDA engine needs no GPU: its buffers, which products it captures, and in what order work ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import load_linears
from torch import Tensor

from tsqp.errors import DeviceMemoryError
from tsqp.transport.base import Buffer, Incoming
from tsqp.wire import codec, messages
from tsqp.worker import cuda
from tsqp.worker.batching import Waiting
from tsqp.worker.cuda import CudaEngine, GraphCache, Multiply, Staging
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import OpenService

QKV = "layers.0.qkv"


class Later:
    """A moment that comes when a test says so."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached

    def elapsed_time(self, end_event: object) -> float:
        assert isinstance(end_event, Later)
        return 2.5


class FakeLane:
    """Works at once, on the CPU, but says that it has not until its last moment is reached."""

    def __init__(self) -> None:
        self.moments: list[Later] = []
        self.captured = 0
        self.capture_error: RuntimeError | None = None
        self.inside = False

    def memory(self, size: int) -> Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    @contextmanager
    def working(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def moment(self) -> Later:
        assert self.inside
        self.moments.append(Later())
        return self.moments[-1]

    def capture(self, multiply: Multiply, x_MK: Tensor) -> Multiply:  # noqa: ARG002
        if self.capture_error:
            raise self.capture_error
        self.captured += 1
        return multiply

    def land(self) -> None:
        for moment in self.moments:
            moment.reached = True


class Desk:
    """A dispatcher, an engine over fake lanes, and the replies by request id."""

    def __init__(self, service: OpenService, lanes: int = 2) -> None:
        self.service = service
        self.lanes = [FakeLane() for _ in range(lanes)]
        self.engine = CudaEngine(service, self.lanes)
        self.dispatcher = Dispatcher(service, "tiny", "digest")
        self.replies: dict[int, tuple[messages.AnyReply, Sequence[Buffer]]] = {}

    def start(self, *asked: tuple[int, Tensor]) -> None:
        batch: list[Waiting] = []
        for request_id, x_MK in asked:
            header = messages.Linear(id=request_id, group=QKV, x=codec.spec_of(x_MK))
            frames = (messages.encode(header), codec.frame_of(x_MK))
            request = self.dispatcher.admit(Incoming(frames, legacy=False, reply=self._reply))
            assert request is not None
            batch.append(request)
        self.engine.start(batch)

    def _reply(self, frames: Sequence[Buffer]) -> None:
        reply, tensors = codec.decode_reply(frames)
        self.replies[reply.id] = (reply, tensors)

    def finish(self) -> list[int]:
        before = set(self.replies)
        self.dispatcher.finish(self.engine.finished())
        return sorted(set(self.replies) - before)

    def tensor(self, request_id: int) -> Tensor:
        reply, (frame,) = self.replies[request_id]
        assert isinstance(reply, messages.Result)
        return codec.tensor_of(reply.y, frame)


def rows(count: int, seed: int) -> Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def desk(tiny_llama: Path) -> Desk:
    return Desk(OpenService(load_linears(tiny_llama), {}))


def test_a_buffer_is_kept_and_grown_to_powers_of_two() -> None:
    sizes: list[int] = []

    def memory(size: int) -> Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    staging = Staging(memory)
    assert staging.view((3, 5), torch.float32).shape == (3, 5)
    staging.view((1 << 18, 1), torch.float32)
    view = staging.view((1 << 18, 2), torch.int32)
    assert (view.dtype, view.nbytes) == (torch.int32, 1 << 21)
    staging.view(((1 << 19) + 1, 1), torch.float32)
    assert sizes == [1 << 20, 1 << 21, 1 << 22]
    assert staging.view((0, 5), torch.float32).shape == (0, 5)


def test_replies_are_sent_when_the_results_are_here_and_not_before(desk: Desk) -> None:
    x = [rows(2, 0), rows(3, 1), rows(1, 2)]
    desk.start((1, x[0]), (2, x[1]))
    assert desk.finish() == []
    assert desk.engine.busy
    assert desk.engine.has_room
    desk.start((3, x[2]))
    assert not desk.engine.has_room
    desk.lanes[1].land()
    assert desk.finish() == []  # the older comes first
    desk.lanes[0].land()
    assert desk.finish() == [1, 2, 3]
    assert not desk.engine.busy
    for request_id, x_MK in enumerate(x, 1):
        torch.testing.assert_close(desk.tensor(request_id), desk.service.multiply(QKV, x_MK))
    assert desk.dispatcher.compute_ns == 2 * 2_500_000


def test_a_result_outlives_the_buffer_that_it_came_in(desk: Desk) -> None:
    """The lane's next batch overwrites it, perhaps before the reply has left."""
    for request_id in range(6):
        desk.start((request_id, rows(2, request_id)))
        for lane in desk.lanes:
            lane.land()
        assert desk.finish() == [request_id]
    for request_id in range(6):
        torch.testing.assert_close(desk.tensor(request_id), desk.service.multiply(QKV, rows(2, request_id)))


def test_operands_are_read_before_the_reply_and_cast(desk: Desk) -> None:
    half = rows(2, 0).half()
    desk.start((1, half), (2, rows(1, 1)))
    desk.lanes[0].land()
    desk.finish()
    assert desk.tensor(1).dtype == torch.float16
    assert desk.tensor(2).dtype == torch.float32


def test_without_memory_each_is_tried_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = desk.service.multiply

    def tight(group: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        if len(x_MK) > 2:
            raise DeviceMemoryError("no room.")
        return multiply(group, x_MK, out_MN)

    monkeypatch.setattr(desk.service, "multiply", tight)
    desk.start((1, rows(2, 0)), (2, rows(3, 1)))
    assert desk.finish() == [1, 2]
    assert isinstance(desk.replies[1][0], messages.Result)
    failure = desk.replies[2][0]
    assert isinstance(failure, messages.Failure)
    assert failure.code == "memory"
    assert desk.engine.has_room
    desk.start((3, rows(1, 0)))
    desk.start((4, rows(1, 0)))
    assert not desk.engine.has_room


def plainly(x_MK: Tensor) -> Tensor:
    return x_MK


def test_a_shape_is_captured_when_it_comes_for_the_third_time() -> None:
    lane = FakeLane()
    graphs = GraphCache(lane.capture)
    seen = []
    for _ in range(5):
        graphs.multiply("a", torch.zeros(2, 3), plainly)
        seen.append(lane.captured)
    assert seen == [0, 0, 1, 1, 1]
    graphs.multiply("b", torch.zeros(2, 3), plainly)
    graphs.multiply("a", torch.zeros(1, 3), plainly)
    graphs.multiply("a", torch.zeros(2, 3, dtype=torch.bfloat16), plainly)
    assert (lane.captured, len(graphs)) == (1, 1)


def test_large_shapes_are_not_captured() -> None:
    lane = FakeLane()
    graphs = GraphCache(lane.capture)
    for _ in range(9):
        graphs.multiply("a", torch.zeros(cuda.MAX_GRAPH_ROWS + 1, 1), plainly)
    assert lane.captured == 0


def test_the_least_recently_used_graph_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MAX_GRAPHS", 2)
    lane = FakeLane()
    graphs = GraphCache(lane.capture)

    def use(group: str, times: int) -> int:
        for _ in range(times):
            graphs.multiply(group, torch.zeros(1, 1), plainly)
        return lane.captured

    assert (use("a", 3), use("b", 3), use("a", 1), use("c", 3)) == (1, 2, 2, 3)
    assert len(graphs) == 2
    assert use("a", 1) == 3
    assert use("b", 2) == 3
    assert use("b", 1) == 4


def test_a_capture_that_fails_ends_capturing_with_one_notice(caplog: pytest.LogCaptureFixture) -> None:
    lane = FakeLane()
    graphs = GraphCache(lane.capture)
    lane.capture_error = RuntimeError("not permitted when stream is capturing")
    for _ in range(9):
        assert len(graphs.multiply("a", torch.zeros(4, 1), plainly)) == 4
        graphs.multiply("b", torch.zeros(4, 1), plainly)
    assert not graphs.enabled
    assert len(caplog.records) == 1
    assert "not permitted" in caplog.text


def test_graphs_can_be_turned_off(tiny_llama: Path) -> None:
    lane = FakeLane()
    service = OpenService(load_linears(tiny_llama), {})
    desk = Desk(service)
    desk.engine = CudaEngine(service, [lane], graphs=False)
    for request_id in range(5):
        desk.start((request_id, rows(1, 0)))
        lane.land()
        assert desk.finish() == [request_id]
    assert lane.captured == 0
