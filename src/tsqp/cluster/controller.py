"""Who keeps a pool: a detached actor, which any command finds by the pool's name, and which Ray starts again.

What is wanted is in Ray's own store, and members are actors that outlive this one: after a restart it goes on with
them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import ray
from ray.experimental import internal_kv
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tsqp.cluster import on_ray
from tsqp.cluster.link import NAMESPACE
from tsqp.cluster.pool import Member, Pool
from tsqp.cluster.publish import Publisher
from tsqp.cluster.scaling import Bounds
from tsqp.cluster.spec import Kind, PoolSpec, Wanted
from tsqp.errors import ConfigError, TransportError, TsqpError, bare
from tsqp.reports import PoolMember
from tsqp.wire import directory

_log = logging.getLogger(__name__)

_TICK_S = 0.5
# It may be starting, on a machine that starts workers too.
_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    """A pool, for display. ``reasons`` say why members are missing; ``failures`` in a row came before any was ready."""

    name: str
    directory: str
    workers: int
    least: int
    most: int
    dealers: int
    restarts: int
    failures: int
    closing: bool
    members: tuple[PoolMember, ...]
    reasons: tuple[str, ...]

    def ready(self, kind: Kind) -> int:
        """Return how many members of a kind enclaves may use."""
        return sum(each.kind == kind and each.phase == "ready" for each in self.members)

    @property
    def is_at_size(self) -> bool:
        """Whether all are there that are wanted, and no others."""
        return len(self.members) == self.workers + self.dealers == self.ready("worker") + self.ready("dealer")


@ray.remote
class Controller:
    """Keeps a pool until it is told to close it. Of its methods each returns at once."""

    def __init__(self, spec: PoolSpec, wanted: Wanted) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        here = ray.get_runtime_context().get_node_id()
        host = next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == here)
        self._failure: TsqpError | None = None
        try:
            self._publisher = Publisher(host, spec.port)
        except TsqpError as error:
            self._failure = error
            return
        launcher = on_ray.RayLauncher(spec)
        members = {
            name: Member(name, kind, None, handle, told="starting")
            for name, (kind, handle) in launcher.running().items()
        }
        kept = _kept(spec.name)
        self._pool = Pool(spec, kept or wanted, launcher, launcher.new_name, members)
        self._kept: Wanted | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._work, name="tsqp-pool", daemon=True).start()

    def scale(self, least: int, most: int, workers: int | None) -> None:
        """See ``pool.Pool.scale``."""
        with self._lock:
            self._pool.scale(Bounds(least, most), workers)
            self._keep()

    def close(self) -> None:
        """See ``pool.Pool.close``."""
        with self._lock:
            self._pool.close()

    def state(self) -> PoolState:
        """Return what there is.

        Raises:
            TsqpError: the pool could not be started.
        """
        if self._failure is not None:
            raise self._failure
        with self._lock:
            pool = self._pool
            return PoolState(
                name=pool.spec.name,
                directory=self._publisher.url,
                workers=0 if pool.closing else pool.wanted.workers,
                least=pool.wanted.bounds.least,
                most=pool.wanted.bounds.most,
                dealers=0 if pool.closing else pool.spec.dealers,
                restarts=pool.restarts,
                failures=pool.failures(),
                closing=pool.closing,
                members=tuple(map(_shown, pool.members.values())),
                reasons=tuple(pool.reasons()),
            )

    def _work(self) -> None:
        while True:
            try:
                with self._lock:
                    self._publisher.text = directory.encode(self._pool.tick(time.monotonic()))
                    self._keep()
            except Exception:  # noqa: BLE001  a bug here must not end the keeping
                _log.exception("keeping the pool failed")
            time.sleep(_TICK_S)

    def _keep(self) -> None:
        """Store what is wanted, where that has changed."""
        if self._pool.wanted != self._kept:
            self._kept = self._pool.wanted
            internal_kv._internal_kv_put(  # noqa: SLF001  Ray's own store has no other name
                _place(self._pool.spec.name), msgspec.json.encode(self._kept), overwrite=True, namespace=_STORE
            )


_STORE = NAMESPACE.encode()


def _place(pool: str) -> bytes:
    return f"pool/{pool}".encode()


def _kept(pool: str) -> Wanted | None:
    stored = internal_kv._internal_kv_get(_place(pool), namespace=_STORE)  # noqa: SLF001  as above
    return msgspec.json.decode(stored, type=Wanted) if stored else None


def _shown(member: Member) -> PoolMember:
    report, place = member.report, member.report.place
    return PoolMember(
        name=member.name,
        kind=member.kind,
        phase=report.phase if member.leaving_s is None else "draining",
        node=place.address if place else "",
        party=place.party if place else "",
        url=report.url,
        key=report.key,
        pid=report.pid,
        actor_pid=place.pid if place else 0,
        waiting=report.waiting,
        reason=report.reason,
    )


def _name(pool: str) -> str:
    return f"tsqp-pool-{pool}"


def _found(pool: str) -> ray.actor.ActorHandle[Any] | None:
    """Return who keeps a pool; None where nobody does."""
    try:
        return ray.get_actor(_name(pool), namespace=NAMESPACE)
    except ValueError:
        return None


class PoolClient:
    """A pool that runs, by its name, in the Ray cluster that this process is connected to.

    Raises:
        ConfigError: there is none.
    """

    def __init__(self, pool: str) -> None:
        found = _found(pool)
        if found is None:
            raise ConfigError(
                f"no pool {pool!r} runs in this Ray cluster: start one (tsqp cluster up), or say which (--pool)."
            )
        self._actor: Any = found
        self._pool = pool

    @classmethod
    def create(cls, spec: PoolSpec, wanted: Wanted) -> PoolClient:
        """Start a pool, kept on this node, where its directory is.

        Raises:
            ConfigError: there is one of this name, which stays as it is.
            TsqpError: who is to keep it cannot; nothing is left then.
        """
        already = ConfigError(
            f"the pool {spec.name!r} runs already: change it (tsqp cluster scale), or end it (tsqp cluster down)."
        )
        if _found(spec.name) is not None:
            raise already
        here = ray.get_runtime_context().get_node_id()
        internal_kv._internal_kv_del(_place(spec.name), namespace=_STORE)  # noqa: SLF001  as above
        try:
            Controller.options(  # type: ignore[attr-defined]
                name=_name(spec.name),
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            ).remote(spec, wanted)
        except ValueError as error:
            raise already from error
        client = cls(spec.name)
        try:
            client.state()
        except TsqpError:
            client.end()
            raise
        return client

    def state(self) -> PoolState:
        """Return what there is.

        Raises:
            TransportError: who keeps the pool does not answer.
        """
        found: PoolState = self._ask(self._actor.state.remote())
        return found

    def scale(self, bounds: Bounds, workers: int | None) -> None:
        """See ``pool.Pool.scale``.

        Raises:
            TransportError: who keeps the pool does not answer.
        """
        self._ask(self._actor.scale.remote(bounds.least, bounds.most, workers))

    def close(self) -> None:
        """Let all members go; ``end`` then ends who kept them.

        Raises:
            TransportError: who keeps the pool does not answer.
        """
        self._ask(self._actor.close.remote())

    def end(self) -> None:
        """End who keeps the pool."""
        ray.kill(self._actor)
        with contextlib.suppress(ray.exceptions.RayError):
            internal_kv._internal_kv_del(_place(self._pool), namespace=_STORE)  # noqa: SLF001  as above

    def _ask(self, answer: Any) -> Any:  # noqa: ANN401  Ray's references
        try:
            return ray.get(answer, timeout=_ANSWER_S)
        except ray.exceptions.GetTimeoutError as error:
            raise TransportError(
                f"who keeps the pool {self._pool!r} has not answered for {_ANSWER_S:g} s: try again, and look at its "
                "log on the head of the Ray cluster."
            ) from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, TsqpError):
                raise bare(error.cause) from error
            raise TransportError(f"who keeps the pool {self._pool!r} failed: {error.cause}") from error
        except ray.exceptions.RayError as error:
            raise TransportError(
                f"who keeps the pool {self._pool!r} has ended ({type(error).__name__}); Ray may start it again."
            ) from error
