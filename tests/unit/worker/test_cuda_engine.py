"""What of the CUDA engine needs no GPU: its buffers, which products it captures, and in what order work ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_models import load_linears
from torch import Tensor

from tsqp.errors import DeviceError, DeviceMemoryError
from tsqp.model.architecture import chain_name
from tsqp.model.ops import read_state
from tsqp.model.weights import Checkpoint
from tsqp.transport.base import Buffer, Incoming
from tsqp.transport.spinning import Ahead
from tsqp.wire import codec, messages
from tsqp.worker import lanes
from tsqp.worker.batching import Waiting
from tsqp.worker.cuda import CudaEngine
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.lanes import Staging, Work
from tsqp.worker.server import Worker
from tsqp.worker.services import OpenService

QKV = "layers.0.qkv"


class Later:
    """A moment that comes when a test says so, a millisecond after the one before."""

    def __init__(self, lane: FakeLane, number: int) -> None:
        self.lane, self.number = lane, number
        self.reached = False

    def query(self) -> bool:
        if self.lane.failure:
            raise self.lane.failure
        return self.reached

    def elapsed_time(self, end_event: object) -> float:
        assert isinstance(end_event, Later)
        return float(end_event.number - self.number)


class FakeLane:
    """Works on the CPU when a test says so: until then operands are not read, and results are not numbers."""

    def __init__(self) -> None:
        self.moments: list[Later] = []
        self.captured = 0
        self.replayed = 0
        self.capture_error: RuntimeError | None = None
        self.inside = False
        self.failure: RuntimeError | None = None
        self._queue: list[Callable[[], object]] = []

    def memory(self, size: int) -> Tensor:
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    @contextmanager
    def working(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def moment(self) -> Later:
        assert self.inside
        self.moments.append(Later(self, len(self.moments)))
        return self.moments[-1]

    def copy(self, source: Tensor, target: Tensor) -> None:
        assert self.inside
        self._queue.append(lambda: target.copy_(source))

    def compute(self, work: Work) -> Tensor:
        result = work().fill_(math.nan)
        self._queue.append(lambda: result.copy_(work()))
        return result

    def capture(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        if self.capture_error:
            raise self.capture_error
        self.captured += 1
        result = work().fill_(math.nan)

        def replay() -> None:
            self.replayed += 1
            self._queue.append(lambda: result.copy_(work()))

        return replay, result

    @torch.inference_mode()
    def land(self) -> None:
        for work in self._queue:
            work()
        self._queue.clear()
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

    def start(self, *asked: tuple[int, Tensor], chain: tuple[str, ...] | None = None) -> None:
        batch: list[Waiting] = []
        for request_id, x_MK in asked:
            header: messages.AnyRequest = messages.Linear(id=request_id, group=QKV, x=codec.spec_of(x_MK))
            if chain:
                header = messages.LinearChain(id=request_id, groups=chain, x=codec.spec_of(x_MK))
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
    linears = load_linears(tiny_llama)
    return Desk(OpenService(linears, read_state(linears, Checkpoint(tiny_llama))))


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


def test_a_buffer_that_is_too_large_to_pin_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "MAX_PINNED_BYTES", 1 << 21)
    sizes: list[int] = []

    def memory(size: int) -> Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    staging = Staging(memory)
    staging.view((1 << 19, 1), torch.float32)
    large = staging.view(((1 << 19) + 1, 1), torch.float32)
    assert (large.shape, large.dtype) == (((1 << 19) + 1, 1), torch.float32)
    staging.view((1, 1), torch.float32)
    assert sizes == [1 << 21]


def test_replies_are_sent_when_the_results_are_here_and_not_before(desk: Desk) -> None:
    x = [rows(2, 0), rows(3, 1), rows(1, 2)]
    desk.start((1, x[0]), (2, x[1]))
    assert desk.finish() == []
    assert desk.engine.busy
    assert desk.engine.has_room
    desk.start((3, x[2]))
    assert not desk.engine.has_room
    desk.lanes[0].land()
    assert desk.finish() == []  # the older comes first
    desk.lanes[1].land()
    assert desk.finish() == [1, 2, 3]
    assert not desk.engine.busy
    for request_id, x_MK in enumerate(x, 1):
        torch.testing.assert_close(desk.tensor(request_id), desk.service.multiply(QKV, x_MK))
    assert desk.dispatcher.compute_ns == 2 * 3_000_000
    reply = desk.replies[3][0]
    assert isinstance(reply, messages.Result)
    assert (reply.compute_ns, reply.copy_ns) == (3_000_000, 2_000_000)  # a millisecond in, one for the product, one out


def test_chains_are_products_too_and_captured(desk: Desk) -> None:
    names = ("layers.0.o", "layers.0.gate_up", "layers.0.down", "layers.1.qkv")
    x = [torch.randn(2, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    for request_id, x_MC in enumerate(x):
        desk.start((request_id, x_MC), chain=names)
        desk.lanes[1].land()
        assert desk.finish() == [request_id]
        torch.testing.assert_close(desk.tensor(request_id), desk.service.multiply(chain_name(names), x_MC))
    assert (desk.engine.captured, desk.lanes[1].replayed) == (1, 3)


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
    desk.lanes[1].land()
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


def test_captured_products_are_of_the_rows_that_came(desk: Desk) -> None:
    """What a graph reads and writes stays where it is; each time other rows must be there."""
    lane = desk.lanes[-1]
    for request_id in range(6):
        desk.start((request_id, rows(2, request_id)))
        lane.land()
        assert desk.finish() == [request_id]
    assert (lane.captured, lane.replayed) == (1, 4)
    for request_id in range(6):
        torch.testing.assert_close(desk.tensor(request_id), desk.service.multiply(QKV, rows(2, request_id)))


def test_a_lone_client_always_has_the_same_lane(desk: Desk) -> None:
    for request_id in range(6):
        desk.start((request_id, rows(1, 0)))
        for lane in desk.lanes:
            lane.land()
        desk.finish()
    assert [lane.captured for lane in desk.lanes] == [0, 1]


def failure_code(desk: Desk, request_id: int) -> str:
    reply = desk.replies[request_id][0]
    assert isinstance(reply, messages.Failure)
    return reply.code


GONE = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


def test_a_device_that_fails_ends_what_is_under_way_and_then_the_engine(desk: Desk) -> None:
    desk.start((1, rows(1, 0)), (2, rows(2, 0)))
    desk.start((3, rows(1, 0)))
    desk.lanes[1].failure = GONE
    assert desk.finish() == [1, 2, 3]
    assert {failure_code(desk, request_id) for request_id in (1, 2, 3)} == {"internal"}
    assert desk.engine.busy
    assert not desk.engine.has_room
    with pytest.raises(DeviceError, match=r"cpu has failed.* \(CUDA error: an illegal memory access was encountered\)"):
        desk.finish()


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_device_that_fails_at_a_launch_is_noticed_too(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, in_flight: int
) -> None:
    def broken(*_: object) -> Tensor:
        for lane in desk.lanes:
            lane.failure = GONE
        raise GONE

    for request_id in range(in_flight):
        desk.start((request_id, rows(1, 0)))
    monkeypatch.setattr(desk.service, "multiply", broken)
    desk.start((7, rows(1, 0)))
    assert not desk.engine.has_room
    assert desk.finish() == [*range(in_flight), 7]
    with pytest.raises(DeviceError):
        desk.finish()


def test_a_bug_in_a_product_is_no_failure_of_the_device(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("size mismatch")

    with monkeypatch.context() as patch:
        patch.setattr(desk.service, "multiply", broken)
        desk.start((1, rows(1, 0)))
    assert desk.finish() == [1]
    assert failure_code(desk, 1) == "internal"
    desk.start((2, rows(1, 0)))
    desk.lanes[1].land()
    assert desk.finish() == [2]


def test_a_worker_whose_device_fails_answers_and_stops(desk: Desk) -> None:
    class Once:
        """A transport with one message."""

        ahead: Ahead | None = None
        hung_up = False

        def __init__(self, incoming: Incoming) -> None:
            self.incoming = [incoming]

        def receive(self, timeout_s: float) -> Incoming | None:
            for lane in desk.lanes:
                lane.failure = GONE
            assert self.incoming or timeout_s == 0.0
            return self.incoming.pop() if self.incoming else None

        def close(self, linger_s: float = 0.0) -> None:
            pass

    x_MK = rows(1, 0)
    header = messages.Linear(id=1, group=QKV, x=codec.spec_of(x_MK))
    frames = (messages.encode(header), codec.frame_of(x_MK))
    worker = Worker(desk.dispatcher, Once(Incoming(frames, legacy=False, reply=desk._reply)))
    worker._engine = desk.engine
    with pytest.raises(DeviceError):
        worker.serve()
    assert failure_code(desk, 1) == "internal"


def test_a_capture_that_fails_ends_capturing_in_all_lanes_with_one_notice(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """The lane's own graphs go too."""
    first, second = desk.lanes

    def use(count: int) -> None:
        for request_id in (1, 2):  # in both lanes
            desk.start((request_id, rows(count, request_id)))
        first.land()
        second.land()
        desk.finish()
        torch.testing.assert_close(desk.tensor(1), desk.service.multiply(QKV, rows(count, 1)))

    for _ in range(3):
        use(1)
    assert desk.engine.captured == 2
    second.capture_error = RuntimeError("not permitted when stream is capturing")
    for _ in range(3):
        use(2)
    captured_before = first.captured
    for _ in range(9):
        use(3)
    assert (first.captured, second.captured) == (captured_before, 1)
    assert desk.engine.captured == captured_before
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
