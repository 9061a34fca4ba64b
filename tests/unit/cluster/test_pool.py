"""How a pool is kept, with members that do as they are told."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest

from tsqp.cluster.pool import LostError, Member, Pool, check_apart
from tsqp.cluster.scaling import IDLE_S, WINDOW_S, Bounds
from tsqp.cluster.spec import Kind, Place, PoolSpec, Report, Wanted
from tsqp.errors import ConfigError, PlacementError, SetupError

SPEC = PoolSpec(name="test", settle_s=5.0)
WITH_DEALERS = replace(SPEC, dealers=1, dealer_key="dealer.key_secret")


@dataclass
class FakeHandle:
    """A member that gets on by one step each time it is asked, and fails when told."""

    number: int
    place: Place
    orders: list[str] = field(default_factory=list)
    report_now: Report | None = None
    is_lost: bool = False

    def report(self) -> Report | None:
        if self.is_lost:
            raise LostError("its actor has ended.")
        if self.report_now is None:
            self.report_now = Report(phase="placed", place=self.place)
            return None
        return self.report_now

    def start(self) -> None:
        self.orders.append("start")
        self.become("ready")

    def drain(self) -> None:
        self.orders.append("drain")
        self.become("lost")

    def discard(self) -> None:
        self.orders.append("discard")

    def become(self, phase: str, **more: object) -> None:
        url = f"tcp://10.0.0.1:{self.number}" if phase == "ready" else ""
        self.report_now = Report(phase=phase, place=self.place, url=url, **more)  # type: ignore[arg-type]


@dataclass
class FakeLauncher:
    """Places workers on nodes of their own, and dealers on their party's."""

    handles: list[FakeHandle] = field(default_factory=list)
    known: frozenset[str] = frozenset()
    nodes: dict[Kind, str] = field(default_factory=dict)
    refuses: bool = False

    def launch(self, kind: Kind, name: str, party: str | None) -> FakeHandle:
        if self.refuses:
            raise SetupError(f"{name} cannot be launched.")
        node = self.nodes.get(kind, f"node of {party or 'pool'}")
        self.handles.append(FakeHandle(len(self.handles) + 1, Place(node, node, party or "", 1)))
        return self.handles[-1]

    def parties(self) -> frozenset[str]:
        return self.known


def pool_of(workers: int, launcher: FakeLauncher, spec: PoolSpec = SPEC, most: int | None = None) -> Pool:
    numbers = itertools.count(1)
    wanted = Wanted(workers=workers, bounds=Bounds(min(workers, 1), most or workers))
    return Pool(spec, wanted, launcher, lambda kind: f"{kind}-{next(numbers)}")


def listed(pool: Pool) -> list[str]:
    return [entry.address for entry in pool.directory().workers]


def settled(pool: Pool, start: float = 0.0) -> float:
    for at in range(6):
        pool.tick(start + at)
    return start + 6


def test_a_pool_comes_to_be_as_it_is_wanted() -> None:
    launcher = FakeLauncher()
    pool = pool_of(2, launcher)
    assert listed(pool) == []
    settled(pool)
    assert listed(pool) == ["tcp://10.0.0.1:1", "tcp://10.0.0.1:2"]
    assert [handle.orders for handle in launcher.handles] == [["start"], ["start"]]


def test_a_member_that_is_lost_leaves_the_directory_at_once_and_is_replaced() -> None:
    launcher = FakeLauncher()
    pool = pool_of(2, launcher)
    now = settled(pool)
    launcher.handles[0].is_lost = True
    launcher.handles[1].become("lost", reason="its process ended with exit code -9.")
    pool.tick(now)
    assert listed(pool) == []
    assert [handle.orders[-1] for handle in launcher.handles[:2]] == ["discard", "discard"]
    assert any("exit code -9" in reason for reason in pool.reasons())
    settled(pool, now + 1)
    assert listed(pool) == ["tcp://10.0.0.1:3", "tcp://10.0.0.1:4"]
    assert pool.restarts == 2
    assert pool.reasons() == []


def test_what_never_comes_up_is_tried_again_ever_more_seldom() -> None:
    launcher = FakeLauncher()
    pool = pool_of(1, launcher)
    tried: list[int] = []
    for at in range(100):
        pool.tick(float(at))
        if len(launcher.handles) > len(tried):
            tried.append(at)
        for handle in launcher.handles:
            handle.report_now = Report(phase="lost", reason="the model is missing.")
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert pauses == sorted(pauses)
    assert pauses[-1] >= 16
    assert "the model is missing." in pool.reasons()[0]


def test_a_launcher_that_refuses_is_an_answer_and_not_the_end() -> None:
    launcher = FakeLauncher(refuses=True)
    pool = pool_of(1, launcher)
    pool.tick(0.0)
    assert "cannot be launched" in pool.reasons()[0]
    launcher.refuses = False
    settled(pool, 10)
    assert len(listed(pool)) == 1


def test_who_is_not_needed_leaves_the_directory_before_it_is_drained() -> None:
    launcher = FakeLauncher()
    pool = pool_of(2, launcher)
    now = settled(pool)
    launcher.handles[0].become("ready", waiting=3)
    launcher.handles[1].become("ready", waiting=0)
    pool.tick(now)
    pool.scale(Bounds(1, 1))
    pool.tick(now)
    assert listed(pool) == ["tcp://10.0.0.1:1"] or listed(pool) == ["tcp://10.0.0.1:2"]
    leaving = launcher.handles[1 if listed(pool)[0].endswith(":1") else 0]
    pool.tick(now + SPEC.settle_s - 0.5)
    assert "drain" not in leaving.orders
    pool.tick(now + SPEC.settle_s)
    pool.tick(now + SPEC.settle_s + 1)
    assert leaving.orders == ["start", "drain", "discard"]
    assert len(pool.members) == 1
    assert pool.restarts == 0


def test_more_are_started_when_requests_wait_and_fewer_are_kept_when_none_do() -> None:
    launcher = FakeLauncher()
    pool = pool_of(1, launcher, most=2)
    now = settled(pool)
    launcher.handles[0].become("ready", waiting=9)
    for at in range(int(WINDOW_S) + 8):
        pool.tick(now + at)
    assert len(listed(pool)) == 2
    now += WINDOW_S + 8
    for handle in launcher.handles:
        handle.become("ready", waiting=0)
    for at in range(int(IDLE_S) + 3):
        pool.tick(now + at)
    assert len(listed(pool)) == 1


def test_a_closed_pool_drains_all_and_starts_none() -> None:
    launcher = FakeLauncher()
    pool = pool_of(2, launcher)
    now = settled(pool)
    pool.close()
    for at in range(10):
        pool.tick(now + at)
    assert pool.members == {}
    assert len(launcher.handles) == 2
    assert all(handle.orders == ["start", "drain", "discard"] for handle in launcher.handles)


def test_who_keeps_a_pool_goes_on_with_members_that_run_already() -> None:
    launcher = FakeLauncher()
    first = pool_of(2, launcher)
    now = settled(first)
    launcher.handles[1].become("draining")
    running = {
        name: Member(name, each.kind, None, each.handle, told="starting") for name, each in first.members.items()
    }
    again = Pool(SPEC, first.wanted, launcher, lambda _kind: "worker-9", running)
    settled(again, now)
    assert listed(again) == ["tcp://10.0.0.1:1", "tcp://10.0.0.1:3"]
    assert launcher.handles[0].orders == ["start"]


def test_dealers_are_on_nodes_of_other_parties_one_each() -> None:
    launcher = FakeLauncher(known=frozenset({"acme", "zeta"}))
    pool = pool_of(1, launcher, replace(WITH_DEALERS, dealers=2))
    settled(pool)
    assert {each.party for each in pool.members.values() if each.kind == "dealer"} == {"acme", "zeta"}
    assert len(pool.directory().dealers) == 2


def test_without_a_node_of_another_party_no_dealer_is_started() -> None:
    launcher = FakeLauncher(known=frozenset({"acme"}))
    pool = pool_of(1, launcher, replace(WITH_DEALERS, dealers=2))
    settled(pool)
    assert any("no node for a dealer: 2 dealers need nodes of 2 other parties" in each for each in pool.reasons())
    assert len(listed(pool)) == 1
    assert pool.directory().dealers == ()


@pytest.mark.parametrize(
    "nodes",
    [{"worker": "shared", "dealer": "shared"}, {"dealer": "node of pool"}],
    ids=["both on a third node", "the dealer on the worker's"],
)
def test_a_dealer_beside_a_worker_is_never_started(nodes: dict[Kind, str]) -> None:
    launcher = FakeLauncher(known=frozenset({"acme"}), nodes=nodes)
    pool = pool_of(1, launcher, WITH_DEALERS)
    settled(pool)
    started = [handle for handle in launcher.handles if "start" in handle.orders]
    assert len(started) == 1
    assert any("together they could unmask" in reason for reason in pool.reasons())


HERE = Place("n1", "10.0.0.1", "", 1)
THEIRS = Place("n2", "10.0.0.2", "acme", 1)


def test_members_are_only_where_they_may_be() -> None:
    check_apart("worker", HERE, [("worker", HERE), ("dealer", THEIRS)])
    check_apart("dealer", THEIRS, [("worker", HERE), ("dealer", THEIRS)])
    with pytest.raises(PlacementError, match="no other party's"):
        check_apart("dealer", HERE, [])
    with pytest.raises(PlacementError, match="which is for dealers"):
        check_apart("worker", THEIRS, [])
    with pytest.raises(PlacementError, match="together they could unmask"):
        check_apart("dealer", THEIRS, [("worker", THEIRS)])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "Pool 1"}, "no name for a pool"),
        ({"cpus": 0.0}, "more than 0 CPUs"),
        ({"tensor_parallel": 0}, "1 rank or more"),
        ({"tensor_parallel": 2, "gpus_per_rank": 0.5}, "do not share a GPU"),
        ({"dealers": 1}, "dealers need keys"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        PoolSpec(**{"name": "test", **change})  # type: ignore[arg-type]


def test_a_worker_takes_the_gpus_of_all_its_ranks_and_a_dealer_takes_none() -> None:
    spec = PoolSpec(name="test", gpus_per_rank=1, tensor_parallel=4)
    assert spec.resources("worker") == {"CPU": 1.0, "GPU": 4.0}
    assert spec.resources("dealer") == {"CPU": 1.0}
