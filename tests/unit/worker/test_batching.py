"""Which requests are multiplied together, in what order, and that each gets what it would have got alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from tiny_models import load_linears
from torch import Tensor
from workers import packed_tiny

from tsqp.arith.ring import Codes, lay_out
from tsqp.errors import DeviceMemoryError
from tsqp.model.architecture import LinearGroup, chain_name
from tsqp.model.ops import read_state
from tsqp.model.packed import open_codes
from tsqp.model.weights import Checkpoint
from tsqp.transport.base import Buffer, Incoming
from tsqp.transport.base import Client as Client_
from tsqp.transport.spinning import Ahead
from tsqp.wire import codec, int8_rows, messages
from tsqp.wire.messages import AnyReply, AnyRequest, TensorSpec
from tsqp.worker import batching
from tsqp.worker.batching import Queue, Rows, Waiting
from tsqp.worker.clients import LEAST_ROWS, MAX_LEAD_ROWS, Account, Limits
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.products import CpuEngine
from tsqp.worker.server import MAX_TAKEN, Worker
from tsqp.worker.services import DealerService, ExactService, OpenService, WorkerService

CPU = torch.device("cpu")
QKV, DOWN = "layers.1.qkv", "layers.1.down"
CHAIN = ("layers.1.o", "layers.1.gate_up", DOWN, "layers.2.qkv")
INPUTS = {QKV: 48, DOWN: 80}


@dataclass
class Client:
    """Messages of one test, and the replies to them by request id, in order of arrival."""

    replies: dict[int, tuple[AnyReply, Sequence[Buffer]]] = field(default_factory=dict)
    slots: list[memoryview] = field(default_factory=list)
    has_slots: bool = False

    def message(self, frames: Sequence[Buffer]) -> Incoming:
        return Incoming(tuple(frames), legacy=False, reply=self._reply, allocate=self._allocate)

    def _allocate(self, size: int) -> memoryview | None:
        if not self.has_slots:
            return None
        self.slots.append(memoryview(bytearray(size)))
        return self.slots[-1]

    def _reply(self, frames: Sequence[Buffer]) -> None:
        reply, tensors = codec.decode_reply(frames)
        assert reply.id not in self.replies
        self.replies[reply.id] = (reply, tensors)

    def tensor(self, request_id: int) -> Tensor:
        reply, (frame,) = self.replies[request_id]
        assert isinstance(reply, messages.Result)
        return codec.tensor_of(reply.y, frame)

    def code(self, request_id: int) -> str:
        reply, _ = self.replies[request_id]
        return reply.code if isinstance(reply, messages.Failure) else ""


class Line:
    """A transport whose messages are all there at once; the loop ends when they are taken."""

    ahead: Ahead | None = None

    def __init__(self, incoming: Sequence[Incoming]) -> None:
        self._incoming = list(incoming)
        self.hung_up = False

    def receive(self, timeout_s: float) -> Incoming | None:
        if self._incoming:
            return self._incoming.pop(0)
        self.hung_up = timeout_s > 0
        return None

    def close(self, linger_s: float = 0.0) -> None:
        pass


def serve(service: WorkerService, incoming: Sequence[Incoming]) -> Dispatcher:
    """Run a worker's loop over messages that wait together."""
    dispatcher = Dispatcher(service, "tiny", "digest")
    worker = Worker(dispatcher, Line(incoming))
    worker.serve()
    return dispatcher


def linear(request_id: int, group: str, x_MK: Tensor) -> list[Buffer]:
    kind = messages.LinearExact if x_MK.dtype == torch.int32 else messages.Linear
    return [messages.encode(kind(id=request_id, group=group, x=codec.spec_of(x_MK))), codec.frame_of(x_MK)]


def words(rows: int, group: str = QKV, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, (rows, INPUTS[group]), generator=generator).to(torch.int32)


@pytest.fixture(scope="module")
def groups(tiny_llama: Path) -> tuple[LinearGroup, ...]:
    return tuple(load_linears(tiny_llama).groups.values())


@pytest.fixture(scope="module")
def codes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Codes]:
    packed = open_codes(packed_tiny(tiny_llama, tmp_path_factory.mktemp("batching") / "packed"))
    return {group.name: lay_out(packed.read(group.name)) for group in packed.groups}


@pytest.fixture
def exact(groups: tuple[LinearGroup, ...], codes: dict[str, Codes]) -> ExactService:
    return ExactService(groups, codes, CPU)


@pytest.fixture
def floats(tiny_llama: Path) -> OpenService:
    linears = load_linears(tiny_llama)
    return OpenService(linears, read_state(linears, Checkpoint(tiny_llama)))


def chain(request_id: int, x_MC: Tensor) -> list[Buffer]:
    header = messages.LinearChain(id=request_id, groups=CHAIN, x=codec.spec_of(x_MC))
    return [messages.encode(header), codec.frame_of(x_MC)]


def waiting(request_id: int, group: str | None, rows: int = 1, account: Account | None = None) -> Waiting:
    header = messages.LinearExact(id=request_id, group=group or "x", x=TensorSpec("int32", (rows, 1)))
    x_MK = torch.zeros(rows, 1, dtype=torch.int32)
    incoming = Incoming((codec.frame_of(x_MK),), legacy=False, reply=lambda _frames: None)
    rows_of = Rows(group, rows) if group else None
    return Waiting(header, (x_MK,), rows_of, incoming, x_MK.nbytes, account or alone(), x_MK.nbytes)


def alone() -> Account:
    return Account(Client_(), Limits())


def drained(*requests: Waiting) -> list[list[int]]:
    queue = Queue()
    for request in requests:
        queue.add(request)
    return [[request.header.id for request in batch] for batch in iter(queue.take, [])]


def test_the_oldest_requests_group_goes_first_with_all_others_for_it() -> None:
    order = [waiting(1, "a"), waiting(2, "b"), waiting(3, "a"), waiting(4, "c"), waiting(5, "b")]
    assert drained(*order) == [[1, 3], [2, 5], [4]]


def test_what_stands_alone_is_a_product_of_its_own_in_its_turn() -> None:
    assert drained(waiting(1, None), waiting(2, "a"), waiting(3, None), waiting(4, "a")) == [[1], [2, 4], [3]]


def test_a_batchs_rows_are_bounded_and_a_larger_request_goes_alone() -> None:
    most = batching.MAX_BATCH_ROWS
    assert drained(waiting(1, "a", most - 1), waiting(2, "a", 2), waiting(3, "a", 1)) == [[1, 3], [2]]
    assert drained(waiting(1, "a", 2 * most), waiting(2, "a", 1), waiting(3, "a", most)) == [[1], [2], [3]]


def test_a_client_with_many_requests_is_not_served_before_one_with_a_single_one() -> None:
    greedy, modest = alone(), alone()
    many = [waiting(number, f"group{number}", account=greedy) for number in range(10)]
    assert drained(*many, waiting(10, "other", account=modest))[:2] == [[0], [10]]


def test_a_client_with_long_requests_gets_no_more_rows_than_one_with_short_ones() -> None:
    long, short = alone(), alone()
    requests = [waiting(number, f"long{number}", 320, account=long) for number in range(3)]
    requests += [waiting(10 + number, f"short{number}", 32, account=short) for number in range(20)]
    served = [batch[0] for batch in drained(*requests)]
    assert served[:12] == [0, *range(10, 20), 1]
    assert [number for number in served if number < 10] == [0, 1, 2]


def test_where_not_all_have_room_those_charged_least_join() -> None:
    most, greedy = batching.MAX_BATCH_ROWS, alone()
    many = [waiting(number, "a", most // 4, account=greedy) for number in range(6)]
    assert drained(*many, waiting(6, "a", most // 4))[:2] == [[0, 6, 1, 2], [3, 4, 5]]


steps = st.tuples(st.integers(0, 3), st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 1200))


@given(st.lists(steps | st.none(), max_size=120))
def test_while_a_client_waits_each_other_one_leads_few_products(
    asked: list[tuple[int, str | None, int] | None],
) -> None:
    """Requests come and are taken in any order; None takes the next product."""
    queue, accounts = Queue(), [alone() for _ in range(4)]
    left: dict[int, int] = {}
    led = {(waits, leads): 0 for waits in range(4) for leads in range(4)}
    for number, step in enumerate([*asked, *[None] * len(asked)]):
        if step is not None:
            client, group, rows = step
            queue.add(waiting(number, group, rows, accounts[client]))
            left[number] = client
            continue
        batch = queue.take()
        assert bool(batch) == bool(left)
        served = {accounts.index(request.account) for request in batch}
        for waits in range(4):
            if waits in served or waits not in left.values():
                led |= {(waits, leads): 0 for leads in range(4)}
            else:
                led[waits, accounts.index(batch[0].account)] += 1
        assert max(led.values()) <= MAX_LEAD_ROWS // LEAST_ROWS + 1
        for request in batch:
            del left[request.header.id]
    assert not left
    assert queue.size_bytes == 0


def test_what_is_taken_in_is_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    for request_id in range(batching.MAX_WAITING):
        assert queue.has_room
        queue.add(waiting(request_id, "a"))
    assert not queue.has_room
    queue.take()
    assert queue.has_room
    monkeypatch.setattr(batching, "MAX_WAITING_BYTES", 100)
    queue.add(waiting(1, "a", 25))
    assert not queue.has_room
    queue.take()
    assert queue.has_room


@pytest.mark.parametrize("has_slots", [False, True])
def test_exact_results_have_the_same_bits_alone_and_together(exact: ExactService, has_slots: bool) -> None:  # noqa: FBT001
    xs = [words(rows, group, seed) for seed, (rows, group) in enumerate([(1, QKV), (7, QKV), (3, DOWN), (16, QKV)])]
    groups = [QKV, QKV, DOWN, QKV]
    together = Client(has_slots=has_slots)
    messages_ = [together.message(linear(i, group, x)) for i, (group, x) in enumerate(zip(groups, xs, strict=True))]
    dispatcher = serve(exact, messages_)
    assert (dispatcher.products, dispatcher.product_requests) == (2, 4)
    for i, (group, x) in enumerate(zip(groups, xs, strict=True)):
        alone = Client(has_slots=has_slots)
        serve(exact, [alone.message(linear(i, group, x))])
        assert torch.equal(alone.tensor(i), together.tensor(i))
        assert alone.replies[i][1][0] in alone.slots if has_slots else not alone.slots


def test_float_results_agree_whatever_dtypes_wait_together(floats: OpenService) -> None:
    client = Client()
    generator = torch.Generator().manual_seed(1)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    xs = [
        torch.randn(rows, 48, generator=generator).to(dtype) for rows, dtype in zip((1, 5, 2, 16), dtypes, strict=True)
    ]
    dispatcher = serve(floats, [client.message(linear(i, QKV, x)) for i, x in enumerate(xs)])
    assert dispatcher.products == 1
    for i, x in enumerate(xs):
        alone = Client()
        serve(floats, [alone.message(linear(i, QKV, x))])
        assert client.tensor(i).dtype == x.dtype
        torch.testing.assert_close(client.tensor(i), alone.tensor(i))


@pytest.mark.parametrize("has_slots", [False, True])
def test_chains_that_wait_together_are_one_product(floats: OpenService, has_slots: bool) -> None:  # noqa: FBT001
    """And those for the first group alone are another."""
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(rows, 48 + 48, generator=generator) for rows in (1, 5, 16)]
    client = Client(has_slots=has_slots)
    sent = [*(chain(i, x) for i, x in enumerate(xs)), linear(9, CHAIN[0], xs[0][:, :48].contiguous())]
    dispatcher = serve(floats, [client.message(frames) for frames in sent])
    assert (dispatcher.products, dispatcher.product_requests) == (2, 4)
    for i, x in enumerate(xs):
        alone = Client(has_slots=has_slots)
        serve(floats, [alone.message(chain(i, x))])
        torch.testing.assert_close(client.tensor(i), alone.tensor(i))
        torch.testing.assert_close(client.tensor(i), floats.multiply(chain_name(CHAIN), x))
        assert alone.replies[i][1][0] in alone.slots if has_slots else not alone.slots


def test_chains_in_int8_and_in_floats_wait_together(floats: OpenService) -> None:
    x_MK, residual_MD = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(4))
    coded = int8_rows.encode_beside(x_MK, residual_MD)
    plain = int8_rows.decode_beside(coded, hidden=48)
    client = Client()
    dispatcher = serve(floats, [client.message(chain(1, coded)), client.message(chain(2, plain))])
    assert (dispatcher.products, dispatcher.product_requests) == (1, 2)
    assert torch.equal(client.tensor(1), int8_rows.encode_parts(client.tensor(2), (48, 48, 80)))


def test_a_chain_in_int8_of_another_width_is_refused(floats: OpenService) -> None:
    client = Client()
    serve(floats, [client.message(chain(1, torch.zeros(2, 147, dtype=torch.int8)))])
    failure = client.replies[1][0]
    assert isinstance(failure, messages.Failure)
    assert failure.code == "input"
    assert "linear layers.1.o to layers.2.qkv expects int8 rows of 148 bytes" in failure.message
    assert "got [2, 147]" in failure.message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_a_request_of_no_rows_leaves_the_others_alone(floats: OpenService, dtype: torch.dtype) -> None:
    empty, client = torch.zeros(0, 148 if dtype == torch.int8 else 96, dtype=dtype), Client()
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(5))
    dispatcher = serve(floats, [client.message(chain(1, x)), client.message(chain(2, empty))])
    assert (dispatcher.products, dispatcher.product_requests, dispatcher.errors) == (1, 2, 0)
    assert len(client.tensor(2)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [QKV, "head"])
def test_float_results_are_written_where_the_client_reads_them(
    floats: OpenService, dtype: torch.dtype, group: str
) -> None:
    """Unless they must be converted first."""
    x_MK = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    client, without = Client(has_slots=True), Client()
    serve(floats, [client.message(linear(1, group, x_MK))])
    serve(floats, [without.message(linear(1, group, x_MK))])
    assert torch.equal(client.tensor(1), without.tensor(1))
    assert client.tensor(1).dtype == dtype
    if dtype == torch.float32:
        assert client.replies[1][1][0] in client.slots
    else:
        assert not client.slots


def test_masks_of_several_seeds_are_one_product(groups: Any, codes: dict[str, Codes]) -> None:
    service, client = DealerService(groups, codes, CPU), Client()
    asked = [messages.MaskProduct(id=i, group=QKV, seed=bytes([i]) * 32, first=5 * i, count=i + 1) for i in range(3)]
    dispatcher = serve(service, [client.message([messages.encode(header)]) for header in asked])
    assert (dispatcher.products, dispatcher.product_requests) == (1, 3)
    for header in asked:
        assert torch.equal(client.tensor(header.id), service.product(header, ()))


def test_what_is_invalid_fails_alone(exact: ExactService) -> None:
    client = Client()
    narrow = torch.zeros(2, 47, dtype=torch.int32)
    frames: list[list[Buffer]] = [
        linear(1, QKV, words(2)),
        [b"not a request"],
        linear(3, QKV, narrow),
        [messages.encode(messages.LinearExact(id=4, group=QKV, x=TensorSpec("int32", (9, 48)))), bytes(8)],
        linear(5, "no.such", words(1)),
        linear(6, QKV, words(3)),
    ]
    dispatcher = serve(exact, [client.message(each) for each in frames])
    assert {i: client.code(i) for i in client.replies} == {
        0: "protocol",
        3: "input",
        4: "protocol",
        5: "input",
        1: "",
        6: "",
    }
    assert (dispatcher.products, dispatcher.product_requests, dispatcher.errors) == (1, 2, 4)


def test_what_needs_no_product_is_answered_before_what_does(exact: ExactService) -> None:
    client = Client()
    hello: AnyRequest = messages.Hello(id=2, software="test")
    serve(exact, [client.message(linear(1, QKV, words(1))), client.message([messages.encode(hello)])])
    assert list(client.replies) == [2, 1]


class TightService(ExactService):
    """Has room for so many rows, and fails on a row that starts with 13."""

    most = 4

    def multiply(self, group: str, x_MK: Tensor, out_MN: Tensor | None = None) -> Tensor:
        if len(x_MK) > self.most:
            raise DeviceMemoryError("no room.")
        if (x_MK[:, 0] == 13).any():
            raise ZeroDivisionError
        return super().multiply(group, x_MK, out_MN)


def test_without_room_for_all_each_is_computed_alone(groups: Any, codes: dict[str, Codes]) -> None:
    client = Client()
    service = TightService(groups, codes, CPU)
    requests = [linear(1, QKV, words(3)), linear(2, QKV, words(5)), linear(3, QKV, words(2, seed=3))]
    dispatcher = serve(service, [client.message(each) for each in requests])
    assert [client.code(i) for i in (1, 2, 3)] == ["", "memory", ""]
    assert torch.equal(client.tensor(3), ExactService(groups, codes, CPU).multiply(QKV, words(2, seed=3)))
    assert (dispatcher.products, dispatcher.product_requests) == (3, 3)


def test_a_bug_fails_the_request_that_shows_it(
    groups: Any, codes: dict[str, Codes], caplog: pytest.LogCaptureFixture
) -> None:
    client = Client()
    bad = words(1)
    bad[0, 0] = 13
    requests = [linear(1, QKV, words(1)), linear(2, QKV, bad), linear(3, QKV, words(1))]
    serve(TightService(groups, codes, CPU), [client.message(each) for each in requests])
    assert [client.code(i) for i in (1, 2, 3)] == ["", "internal", ""]
    assert "ZeroDivisionError" in caplog.text


def test_time_is_shared_out_by_rows(exact: ExactService) -> None:
    dispatcher, engine = Dispatcher(exact, "tiny", "digest"), CpuEngine(exact)
    client = Client()
    batch = [dispatcher.admit(client.message(linear(rows, QKV, words(rows)))) for rows in (1, 3)]
    engine.start([request for request in batch if request])
    (product,) = engine.finished()
    shares, copies = zip(
        *(structs.replace(product, copy_ns=400).shares_ns(request) for request in batch if request), strict=True
    )
    assert copies == (100, 300)
    assert product.compute_ns - 2 < sum(shares) <= product.compute_ns
    assert abs(shares[1] - 3 * shares[0]) <= 3


def test_what_was_taken_in_is_answered_after_a_stop(exact: ExactService) -> None:
    client = Client()
    dispatcher = Dispatcher(exact, "tiny", "digest")
    line = Line([client.message(linear(i, group, words(1, group))) for i, group in enumerate([QKV, DOWN])])
    worker = Worker(dispatcher, line)
    worker._take_in()
    worker.stop()
    worker.serve()
    assert sorted(client.replies) == [0, 1]


def test_a_flood_of_what_is_answered_at_once_does_not_keep_a_product_waiting(exact: ExactService) -> None:
    client, flood = Client(), Client()
    hellos = [flood.message([messages.encode(messages.Hello(id=i, software="test"))]) for i in range(1000)]
    worker = Worker(Dispatcher(exact, "tiny", "digest"), Line([client.message(linear(1, QKV, words(1))), *hellos]))
    worker._take_in()
    worker._work()
    assert list(client.replies) == [1]
    assert len(flood.replies) == MAX_TAKEN


def test_behind_a_lone_client_the_worker_looks_seldom(exact: ExactService) -> None:
    client = Client()
    one_by_one = OneByOne(Line([client.message(linear(i, QKV, words(1))) for i in range(256)]))
    Worker(Dispatcher(exact, "tiny", "digest"), one_by_one).serve()
    assert len(client.replies) == 256
    assert one_by_one.looks < 64


class OneByOne:
    """A transport on which a message comes after the reply to the one before: to who waits, not to who looks."""

    ahead: Ahead | None = None

    def __init__(self, line: Line) -> None:
        self._line = line
        self.looks = 0

    @property
    def hung_up(self) -> bool:
        return self._line.hung_up

    def receive(self, timeout_s: float) -> Incoming | None:
        self.looks += timeout_s == 0.0
        return self._line.receive(timeout_s) if timeout_s else None

    def close(self, linger_s: float = 0.0) -> None:
        pass


def test_a_client_that_reads_nothing_is_given_no_norm_weights_more(floats: OpenService) -> None:
    class Deaf(Client_):
        unread_bytes = 1 << 40

    client = Client()
    dispatcher = Dispatcher(floats, "tiny", "digest")
    for header in (messages.State(id=1), messages.Stats(id=2)):
        dispatcher.admit(structs.replace(client.message([messages.encode(header)]), client=Deaf()))
    assert client.code(1) == "busy"
    reply, _ = client.replies[2]
    assert isinstance(reply, messages.StatsResult)
    assert (reply.refused, reply.errors, reply.clients) == (1, 0, 1)
