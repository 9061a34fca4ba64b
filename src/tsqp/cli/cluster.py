"""``tsqp cluster``: pools of workers and dealers on Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from tsqp.cli.reporting import notes, notice, print_json, reported
from tsqp.errors import SetupError, TsqpError
from tsqp.reports import PoolReport

if TYPE_CHECKING:
    from tsqp.cluster.controller import PoolClient, PoolState
    from tsqp.cluster.spec import PoolSpec, Wanted

DIRECTORY_PORT = 50053
_LOOK_S = 0.5
# Members that failed one after the other before a pool was ready.
_TRIES = 3

cluster = typer.Typer(
    name="cluster", help="Pools of workers and dealers on Ray: start, watch, scale and end them.", no_args_is_help=True
)
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="HOST:PORT of the Ray cluster's head; this machine is one of its nodes.",
        show_default=False,
    ),
]
PoolName = Annotated[str, typer.Option(help="Which pool of the Ray cluster.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@cluster.command()
def up(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            help="HOST:PORT of the Ray cluster's head; this machine is one of its nodes. Without one a Ray is started "
            "here, which ends with this command.",
            show_default=False,
        ),
    ] = None,
    pool: PoolName = "default",
    workers: Annotated[int, typer.Option(help="How many workers.")] = 1,
    least: Annotated[
        int | None, typer.Option("--min", help="How few workers, when nothing waits.", show_default="--workers")
    ] = None,
    most: Annotated[
        int | None, typer.Option("--max", help="How many workers, when requests wait.", show_default="--workers")
    ] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs that each rank of a worker takes.")] = 0.0,
    cpus_per_worker: Annotated[float, typer.Option(help="CPUs that each worker or dealer takes.")] = 1.0,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks of each worker.")] = 1,
    model: Annotated[str, typer.Option(help="smollm2, or a model's place on each node.")] = "smollm2",
    exact: Annotated[
        bool, typer.Option("--exact", help="Serve int8 codes, for the levels verified and masked.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(
            help="The workers' key, a file NAME.key_secret on each node; open and verified need one.",
            show_default="each makes one of its own",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(help="Let only clients in that hold this public key, repeatable.", show_default="all"),
    ] = None,
    dealers: Annotated[int, typer.Option(help="How many dealers, each on a node of another party.")] = 0,
    dealer_key: Annotated[
        str | None, typer.Option(help="A dealer's key, a file NAME.key_secret on its own node.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the directory; 0 takes a free one.")] = DIRECTORY_PORT,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds within which all must be ready.")] = 600.0,
    json: AsJson = False,
) -> None:
    """Start a pool, and wait until all of it is ready. It is kept so until 'tsqp cluster down'."""
    with reported(as_json=json):
        from tsqp.cluster.scaling import Bounds
        from tsqp.cluster.spec import PoolSpec, Wanted

        bounds = Bounds(workers if least is None else least, workers if most is None else most)
        device = ("--device", "cuda:0" if gpus_per_worker else "cpu")  # of a worker's first rank; Ray says which
        spec = PoolSpec(
            name=pool,
            arguments=("--model", model, *(("--exact",) if exact else ()), *device),
            dealer_arguments=("--model", model, "--device", "cpu"),
            dealers=dealers,
            cpus=cpus_per_worker,
            gpus_per_rank=gpus_per_worker,
            tensor_parallel=tensor_parallel,
            key=key,
            dealer_key=dealer_key,
            allow=_texts(allow or ()),
            port=port,
        )
        wanted = Wanted(workers=bounds.clamped(workers), bounds=bounds)
        _up(spec, wanted, address, wait_s, _printer(as_json=json))


@cluster.command()
def status(address: Address = None, pool: PoolName = "default", json: AsJson = False) -> None:
    """Show a pool: its members, where they are, and why some are missing."""
    with reported(as_json=json), _joined(address, pool) as (client, joined):
        _printer(as_json=json)(client.state(), joined)


@cluster.command()
def scale(
    address: Address = None,
    pool: PoolName = "default",
    workers: Annotated[int | None, typer.Option(help="How many workers.", show_default="as many as now")] = None,
    least: Annotated[int | None, typer.Option("--min", help="How few, when nothing waits.")] = None,
    most: Annotated[int | None, typer.Option("--max", help="How many, when requests wait.")] = None,
    json: AsJson = False,
) -> None:
    """Change how many workers a pool has, or between which bounds it chooses. Does not wait for them."""
    with reported(as_json=json):
        from tsqp.cluster.scaling import Bounds

        with _joined(address, pool) as (client, joined):
            now = client.state()
            fixed = workers if least is None and most is None else None
            bounds = Bounds(
                *(
                    next(each for each in (given, fixed, before) if each is not None)
                    for given, before in ((least, now.least), (most, now.most))
                )
            )
            client.scale(bounds, workers)
            _printer(as_json=json)(client.state(), joined)


@cluster.command()
def down(
    address: Address = None,
    pool: PoolName = "default",
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds after which members are ended by force.")] = 60.0,
    json: AsJson = False,
) -> None:
    """End a pool: its members leave the directory, answer what they were sent, and end."""
    with reported(as_json=json), _joined(address, pool) as (client, joined):
        _printer(as_json=json)(_ended(client, wait_s), joined)


def _up(
    spec: PoolSpec, wanted: Wanted, address: str | None, wait_s: float, show: Callable[[PoolState, str], None]
) -> None:
    from tsqp.cluster.link import connected

    if address is None:
        notice("no address of a Ray cluster was given: one is started on this machine, and ends with this command.")
    with connected(address) as joined:
        from tsqp.cluster.controller import PoolClient
        from tsqp.cluster.on_ray import check_room, parties
        from tsqp.cluster.pool import check_parties

        if wanted.bounds.most:
            check_room(spec)
        check_parties(spec.dealers, parties())
        client = PoolClient.create(spec, wanted)
        try:
            show(_at_size(client, wait_s), joined)
            if address is None:
                notice(f"the pool runs until Ctrl-C; 'tsqp cluster status --address {joined}' shows it.")
                while True:
                    time.sleep(_LOOK_S)
        except BaseException:
            with suppress(TsqpError):
                if address is None or not client.state().is_at_size:
                    _ended(client, spec.settle_s + spec.drain_s)
            raise


def _at_size(client: PoolClient, wait_s: float) -> PoolState:
    """Wait until a pool is as it is wanted, and tell meanwhile what keeps it from that.

    Raises:
        SetupError: it is not within that time, or what it starts fails again and again.
    """
    deadline = time.monotonic() + wait_s
    told: set[str] = set()
    while not (state := client.state()).is_at_size:
        missing = list(dict.fromkeys((*state.reasons, *(each.reason for each in state.members if each.reason))))
        for reason in missing:
            if reason not in told:
                notice(reason)
        told.update(missing)
        if time.monotonic() > deadline or state.failures >= _TRIES:
            raise SetupError(
                f"{state.ready('worker')} of {state.workers} workers and {state.ready('dealer')} of {state.dealers} "
                f"dealers of the pool {state.name!r} came up, so it was ended. {' '.join(missing)}".strip()
            )
        time.sleep(_LOOK_S)
    return state


def _ended(client: PoolClient, wait_s: float) -> PoolState:
    """Let a pool's members go, and end who kept it."""
    client.close()
    deadline = time.monotonic() + wait_s
    while (state := client.state()).members and time.monotonic() < deadline:
        time.sleep(_LOOK_S)
    client.end()
    if state.members:
        notice(f"{len(state.members)} members had not ended after {wait_s:g} s, and were ended by force.")
    return replace(state, members=())


@contextmanager
def _joined(address: str | None, pool: str) -> Iterator[tuple[PoolClient, str]]:
    """Yield a pool that runs, and the address of its Ray cluster."""
    from tsqp.cluster.link import connected

    if address is None:
        raise SetupError("no Ray cluster was named: give the address of its head, --address HOST:PORT (RAY_ADDRESS).")
    with connected(address) as joined:
        from tsqp.cluster.controller import PoolClient

        yield PoolClient(pool), joined


def _texts(keys: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Return public keys as text: their files are on this machine."""
    from tsqp.transport.keys import load_public

    return tuple(load_public(key).decode() for key in keys)


def _printer(*, as_json: bool) -> Callable[[PoolState, str], None]:
    return (lambda state, joined: print_json(_report(state, joined))) if as_json else _show


def _report(state: PoolState, joined: str) -> PoolReport:
    return PoolReport(
        pool=state.name,
        address=joined,
        directory=state.directory,
        workers=state.workers,
        workers_ready=state.ready("worker"),
        least=state.least,
        most=state.most,
        dealers=state.dealers,
        dealers_ready=state.ready("dealer"),
        restarts=state.restarts,
        members=list(state.members),
        reasons=list(state.reasons),
    )


def _show(state: PoolState, joined: str) -> None:
    from rich.table import Table

    report = _report(state, joined)
    typer.echo(f"pool {report.pool} on Ray at {report.address}; directory {report.directory}")
    typer.echo(
        f"{report.workers_ready} of {report.workers} workers ({report.least} to {report.most}), "
        f"{report.dealers_ready} of {report.dealers} dealers; {report.restarts} replaced so far"
    )
    table = Table("member", "phase", "node", "party", "address", "waiting", box=None, pad_edge=False)
    for each in report.members:
        table.add_row(each.name, each.phase, each.node, each.party or "-", each.url or "-", str(each.waiting))
    if report.members:
        notes.print(table)
    for reason in report.reasons:
        notice(reason)
