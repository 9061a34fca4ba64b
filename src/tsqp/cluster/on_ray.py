"""Members of a pool as Ray's actors, each in a placement group of its own."""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import ray
from ray.util import (
    get_placement_group,
    list_named_actors,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tsqp.cluster.link import NAMESPACE
from tsqp.cluster.pool import LostError
from tsqp.cluster.spec import PARTY_LABEL, Kind, PoolSpec, Report
from tsqp.errors import PlacementError

# An actor that answered before and does not for so long is given up, with its node.
_SILENT_S = 30.0
_PLACING_S = 10.0
# Of a wait for what must be there at once.
_PROMPT_S = 5.0


@ray.remote
class MemberActor:
    """A ``member.Member`` in a process of its own on its node."""

    def __init__(self, kind: Kind, spec: PoolSpec) -> None:
        from tsqp.cluster import member  # noqa: PLC0415  which loads torch, and who keeps a pool needs none

        here = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == here)
        party = str(node["Labels"].get(PARTY_LABEL, ""))
        self._member = member.Member(kind, spec, member.own_place(here, str(node["NodeManagerAddress"]), party))

    def report(self) -> Report:
        """See ``member.Member.report``."""
        return self._member.report()

    def start(self) -> None:
        """See ``member.Member.start``."""
        self._member.start()

    def drain(self) -> None:
        """See ``member.Member.drain``."""
        self._member.drain()


class RayHandle:
    """See ``pool.Handle``.

    Args:
        actor: of the member.
        group: where it is placed; None where that is gone.
        needs: what it takes of a node, for display.
    """

    def __init__(self, actor: Any, group: PlacementGroup | None, needs: str) -> None:  # noqa: ANN401  Ray's handles
        self._actor, self._group, self._needs = actor, group, needs
        self._asked = self._since_s = time.monotonic()
        self._heard = False
        self._answer = actor.report.remote()

    def report(self) -> Report | None:
        """See ``pool.Handle``."""
        if not ray.wait([self._answer], timeout=0)[0]:
            silent_s = time.monotonic() - self._asked
            if self._heard and silent_s > _SILENT_S:
                raise LostError(f"its actor has not answered for {_SILENT_S:g} s: its node hangs or is cut off.")
            if not self._heard and silent_s > _PLACING_S and self._waits_for_room():
                return Report(phase="placing", reason=f"no node has room for it: it takes {self._needs}.")
            return None
        try:
            found: Report = ray.get(self._answer)
        except ray.exceptions.RayError as error:
            raise LostError(f"its actor has ended ({type(error).__name__}).") from error
        self._heard, self._asked = True, time.monotonic()
        self._answer = self._actor.report.remote()
        return found

    def _waits_for_room(self) -> bool:
        return self._group is not None and placement_group_table(self._group)["state"] == "PENDING"

    def start(self) -> None:
        """See ``pool.Handle``."""
        self._actor.start.remote()

    def drain(self) -> None:
        """See ``pool.Handle``."""
        self._actor.drain.remote()

    def discard(self) -> None:
        """See ``pool.Handle``."""
        ray.kill(self._actor)
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None


class RayLauncher:
    """See ``pool.Launcher``.

    Args:
        spec: of the pool.
    """

    def __init__(self, spec: PoolSpec) -> None:
        self._spec = spec

    def launch(self, kind: Kind, name: str, party: str | None) -> RayHandle:
        """See ``pool.Launcher``. Both actor and placement group outlive who asks for them."""
        needs = self._spec.resources(kind)
        known = sorted(parties())
        selector = {PARTY_LABEL: party} if party else {PARTY_LABEL: f"!in({','.join(known)})"} if known else {}
        group = placement_group(
            [needs], strategy="STRICT_PACK", name=name, lifetime="detached", bundle_label_selector=[selector]
        )
        actor = MemberActor.options(  # type: ignore[attr-defined]
            name=name,
            lifetime="detached",
            num_cpus=needs["CPU"],
            num_gpus=needs.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        ).remote(kind, self._spec)
        return RayHandle(actor, group, shown(needs))

    def parties(self) -> frozenset[str]:
        """See ``pool.Launcher``."""
        return parties()

    def new_name(self, kind: Kind) -> str:
        """Return a name for a member that no other has."""
        return f"tsqp-{self._spec.name}-{kind}-{secrets.token_hex(4)}"

    def running(self) -> dict[str, tuple[Kind, RayHandle]]:
        """Return the members that run already."""
        names = re.compile(rf"tsqp-{re.escape(self._spec.name)}-(worker|dealer)-[0-9a-f]{{8}}")
        found: dict[str, tuple[Kind, RayHandle]] = {}
        for name in list_named_actors():
            if match := names.fullmatch(str(name)):
                kind: Kind = "dealer" if match[1] == "dealer" else "worker"
                try:
                    group: PlacementGroup | None = get_placement_group(str(name))
                except ValueError:
                    group = None
                actor = ray.get_actor(str(name), namespace=NAMESPACE)
                found[str(name)] = (kind, RayHandle(actor, group, shown(self._spec.resources(kind))))
        return found


def parties() -> frozenset[str]:
    """Return the other parties that have nodes in the Ray cluster now."""
    return frozenset(str(node["Labels"][PARTY_LABEL]) for node in ray.nodes() if is_of_a_party(node))


def is_of_a_party(node: dict[str, Any]) -> bool:
    """Tell whether a node that is there is another party's, for dealers."""
    return bool(node["Alive"] and node["Labels"].get(PARTY_LABEL))


def check_room(spec: PoolSpec) -> None:
    """Refuse workers that fit on no node that there is, whatever else runs there.

    Raises:
        PlacementError: there is none.
    """
    needs = spec.resources("worker")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and not is_of_a_party(node)]
    if not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        largest: dict[str, float] = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        have = {name: largest.get(name, 0) for name in needs}
        raise PlacementError(
            f"no node for a worker: each takes {shown(needs)} of one node; the largest of {len(nodes)} that are not "
            f"for dealers has {shown(have)}."
        )


def shown(resources: dict[str, float]) -> str:
    """Return what a member takes, for people."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
