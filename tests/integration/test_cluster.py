"""Pools on a real Ray of two nodes on this machine: members are killed while requests run, scaled, and ended."""

from __future__ import annotations

import os
import random
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from engine_answers import Answer
from fake_engine import byte_tokenizer
from sites import Running, until
from typer.testing import CliRunner, Result

from tsqp.cli import app
from tsqp.cluster import link  # sets how Ray is used, before it is imported
from tsqp.config import EnclaveConfig, EngineConfig
from tsqp.engine.api import Finished
from tsqp.engine.directory import read
from tsqp.engine.opening import open_engine
from tsqp.errors import TransportError
from tsqp.levels import Model, open_model
from tsqp.reports import PoolMember, PoolReport
from tsqp.transport import keys

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # none is written for who runs the tests
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # other work on this machine must not end ours
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")

pytest.importorskip("ray")

import ray
from ray.cluster_utils import Cluster

from tsqp.cluster.controller import PoolClient, PoolState
from tsqp.cluster.link import connected
from tsqp.cluster.scaling import Bounds
from tsqp.cluster.spec import PARTY_LABEL, PoolSpec, Wanted
from tsqp.errors import ConfigError

TOKENS = 200
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Place:
    """A Ray cluster, and models and keys for its pools."""

    address: str
    floats: Path
    packed: Path
    directory: Path

    def key(self, name: str) -> tuple[str, str]:
        """Make a key; return its file, for a node, and its public text, for enclaves."""
        public, secret = keys.create(self.directory, name)
        return str(secret), keys.read_public(public).decode()


@pytest.fixture(scope="module")
def place(tiny_llama: Path, tiny_packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    node = {"include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, **node})
    try:
        cluster.add_node(num_cpus=1, labels={PARTY_LABEL: "acme"}, object_store_memory=80 << 20)
        with connected(cluster.address) as address:
            yield Place(address, tiny_llama, tiny_packed, tmp_path_factory.mktemp("keys"))
    finally:
        cluster.shutdown()


def spec_of(name: str, model: Path, **more: Any) -> PoolSpec:
    words = ("--model", str(model), "--device", "cpu")
    return PoolSpec(name=name, arguments=words, dealer_arguments=words, cpus=0.5, settle_s=3.0, **more)


def until_at_size(client: PoolClient, restarts: int | None = None) -> PoolState:
    """Wait for a pool, and for who has counted so many members that were replaced."""
    found: list[PoolState] = []

    def is_at_size() -> bool:
        with suppress(TransportError):  # who keeps it is being started again
            found.append(client.state())
            return found[-1].is_at_size and found[-1].restarts == (found[-1].restarts if restarts is None else restarts)
        return False

    until(is_at_size)
    return found[-1]


@dataclass
class Pools:
    """One for each kind of trust: masked with a dealer, and open, where the worker's key is pinned."""

    masked: PoolClient
    open: PoolClient
    worker_key: str
    dealer_key: str
    own_key: str


@pytest.fixture(scope="module")
def pools(place: Place) -> Pools:
    (secret, worker_key), (dealer_secret, dealer_key) = place.key("worker"), place.key("dealer")
    own_key, allowed = place.key("enclave")
    trust = {"dealers": 1, "dealer_key": dealer_secret, "allow": (allowed,)}
    spec = spec_of("masked", place.packed, tensor_parallel=2, **trust)
    masked = PoolClient.create(spec, Wanted(workers=2, bounds=Bounds(2, 2)))
    floats = PoolClient.create(spec_of("open", place.floats, key=secret), Wanted(workers=1, bounds=Bounds(1, 1)))
    until_at_size(masked)
    until_at_size(floats)
    return Pools(masked, floats, worker_key, dealer_key, own_key)


def test_dealers_are_on_the_other_partys_node_and_workers_are_not(pools: Pools) -> None:
    members = pools.masked.state().members
    assert sorted((each.kind, each.party) for each in members) == [("dealer", "acme"), ("worker", ""), ("worker", "")]
    assert pools.masked.state().reasons == ()


def test_the_directory_has_what_enclaves_need(pools: Pools) -> None:
    found = read(pools.masked.state().directory)
    assert [entry.key for entry in found.dealers] == [pools.dealer_key]
    assert len({entry.key for entry in found.workers}) == 2  # each made one of its own
    assert {entry.key for entry in read(pools.open.state().directory).workers} == {pools.worker_key}


def running(place: Place, pools: Pools, level: str, stack: ExitStack) -> Running:
    directory = place.floats if level == "open" else place.packed
    found = open_model(str(directory), level)
    model = Model(found.directory, found.architecture, byte_tokenizer(), found.packed)
    config = EnclaveConfig(level=level, connect_timeout_s=3.0, request_timeout_s=30.0)
    engine = EngineConfig(kv_memory=1 << 20, worker_rows=2)
    if level == "open":
        engine = replace(engine, directory=pools.open.state().directory, worker_keys=(pools.worker_key,))
    elif level == "masked":
        config = replace(config, dealer_keys=(pools.dealer_key,), own_key=pools.own_key)
        engine = replace(engine, directory=pools.masked.state().directory)
    return Running(stack.enter_context(open_engine(model, config, engine)), [])


def answered(run: Running) -> list[int]:
    answer = run.ask(tokens=TOKENS)
    assert isinstance(answer.end, Finished)
    return answer.ids


def kill(pool: PoolClient, kind: str, way: str, killed: set[str]) -> None:
    """End one more member without a word: its process, one of that's ranks, or its actor."""

    def alive() -> list[PoolMember]:
        members = [each for each in pool.state().members if each.kind == kind and each.phase == "ready"]
        return [each for each in members if each.name not in killed]

    until(lambda: bool(alive()))
    member = alive()[0]
    killed.add(member.name)
    if way == "actor":
        ray.kill(ray.get_actor(member.name, namespace="tsqp"))
    elif way == "process":
        psutil.Process(member.pid).kill()
    else:
        psutil.Process(member.pid).children()[0].kill()


def test_members_that_are_killed_while_requests_run_cost_no_wrong_answer_and_come_back(
    place: Place, pools: Pools
) -> None:
    deaths = [
        (pools.masked, "worker", "rank"),
        (pools.masked, "worker", "actor"),
        (pools.masked, "dealer", "process"),
        (pools.open, "worker", "process"),
    ]
    random.Random(7).shuffle(deaths)
    with ExitStack() as stack:
        local = running(place, pools, "local", stack)
        runs = {level: running(place, pools, level, stack) for level in ("masked", "open")}
        # Floats depend on the kernels: those at open must be the same every time.
        right = {"masked": answered(local), "open": answered(runs["open"])}
        asked: list[tuple[str, Answer]] = []
        killed: set[str] = set()

        def ask_all() -> None:
            for level, run in runs.items():
                with suppress(TransportError):  # told at once that nobody can be used now
                    asked.append((level, run.ask(tokens=TOKENS)))

        for pool, kind, way in deaths:
            ask_all()
            kill(pool, kind, way, killed)
            ask_all()
        until(lambda: pools.masked.state().restarts + pools.open.state().restarts == len(deaths))
        for client in (pools.masked, pools.open):
            until_at_size(client)
        for level, answer in asked:
            if isinstance(answer.end, Finished):
                assert answer.ids == right[level]
            else:
                assert isinstance(answer.error, TransportError)
        for level, run in runs.items():
            run.until_ready()
            size = 2 if level == "masked" else 1
            until(lambda run=run, size=size: run.engine.stats().workers_usable == size)  # type: ignore[misc]
            assert answered(run) == right[level]
            assert run.engine.stats().integrity_failures == 0


def test_who_keeps_a_pool_can_end_and_goes_on_with_the_same_members(pools: Pools) -> None:
    before = until_at_size(pools.open)
    pools.open.scale(Bounds(1, 4), 1)
    with pytest.raises(ConfigError, match="runs already"):  # and changes nothing
        PoolClient.create(PoolSpec(name="open"), Wanted(workers=7, bounds=Bounds(7, 7)))
    controller = ray.get_actor("tsqp-pool-open", namespace="tsqp")
    ray.kill(controller, no_restart=False)

    def is_another() -> bool:
        with suppress(TransportError):  # it is being started
            return pools.open.state().directory != before.directory
        return False

    until(is_another)  # whose directory has another port
    after = until_at_size(pools.open, restarts=0)  # and who has counted none yet
    assert {each.name for each in after.members} == {each.name for each in before.members}
    assert (after.least, after.most) == (1, 4)


@pytest.fixture
def tsqp(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command against the Ray that this process is connected to."""

    @contextmanager
    def joined(_address: str | None) -> Iterator[str]:
        yield place.address

    monkeypatch.setattr(link, "connected", joined)
    runner = CliRunner()
    return lambda *words: runner.invoke(app, ["cluster", *words, "--address", place.address])


def test_a_pool_is_shown_and_scaled_by_commands(pools: Pools, tsqp: Callable[..., Result]) -> None:
    shown = tsqp("status", "--pool", "masked")
    assert "2 of 2 workers (2 to 2), 1 of 1 dealers" in shown.stdout
    assert pools.masked.state().directory in shown.stdout
    report = msgspec.json.decode(tsqp("status", "--pool", "masked", "--json").stdout, type=PoolReport)
    assert (report.workers_ready, report.dealers_ready, len(report.members)) == (2, 1, 3)
    scaled = tsqp("scale", "--pool", "masked", "--min", "1", "--json")
    assert msgspec.json.decode(scaled.stdout, type=PoolReport).least == 1
    assert pools.masked.state().workers == 2
    refused = tsqp("scale", "--pool", "masked", "--min", "5")
    assert (refused.exit_code, "expected 0 or more" in refused.stderr) == (3, True)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("status", "--pool", "other"), "no pool 'other' runs in this Ray cluster"),
        (("up", "--pool", "masked"), "the pool 'masked' runs already"),
        (("up", "--pool", "p", "--gpus-per-worker", "1"), "no node for a worker: each takes 1 CPU and 1 GPU"),
        (
            ("up", "--pool", "p", "--dealers", "2", "--dealer-key", "k"),
            "no node for a dealer: 2 dealers need nodes of 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(
    pools: Pools, tsqp: Callable[..., Result], words: tuple[str, ...], problem: str
) -> None:
    assert pools.masked.state().name == "masked"
    done = tsqp(*words)
    assert (done.exit_code, problem in done.stderr) == (3, True)


def test_a_pool_whose_directory_cannot_be_served_is_told_and_leaves_nothing(
    place: Place, tsqp: Callable[..., Result]
) -> None:
    host = place.address.partition(":")[0]
    with socket.create_server((host, 0)) as taken:
        for _ in range(2):
            done = tsqp("up", "--pool", "p", "--port", str(taken.getsockname()[1]))
            assert (done.exit_code, "choose another port (--port)" in done.stderr) == (3, True)
    assert "no pool 'p' runs" in tsqp("status", "--pool", "p").stderr


def test_a_pool_is_scaled_and_ended(pools: Pools) -> None:
    processes = [psutil.Process(each.pid) for each in pools.masked.state().members]
    pools.masked.scale(Bounds(1, 1), None)
    assert len(until_at_size(pools.masked).members) == 2
    pools.masked.close()
    until(lambda: not pools.masked.state().members)
    assert read(pools.masked.state().directory).workers == ()
    until(lambda: not any(process.is_running() for process in processes))
    pools.masked.end()

    def is_gone() -> bool:
        try:
            PoolClient("masked")
        except ConfigError:
            return True
        return False

    until(is_gone)
