"""``tsqp top``: watch a worker, a dealer or a server."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live

from tsqp import config as settings
from tsqp.cli.reporting import notice, print_json, reported
from tsqp.config import DEFAULT_PORT, EnclaveConfig
from tsqp.errors import ConfigError, SetupError, TsqpError

if TYPE_CHECKING:
    from tsqp.reports import TopReport
    from tsqp.top.reading import Source

_API_KEY = "TSQP_API_KEY"
_LEAST_S, _MOST_S = 0.1, 3600.0


def top(
    url: Annotated[
        str | None,
        typer.Argument(
            help="A worker or dealer: host:port, ipc:///path or shm:///path. A server: http://HOST:PORT or https://...",
            show_default=f"the worker at 127.0.0.1:{DEFAULT_PORT}",
        ),
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two readings.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval, and end.")] = False,
    worker_key: Annotated[
        str | None,
        typer.Option(help="Public key of the worker or dealer: NAME.key or its text.", show_default="a link in clear"),
    ] = None,
    own_key: Annotated[
        str | None,
        typer.Option(
            help="This process's own key, NAME.key_secret, for a peer that lets only some in.",
            show_default="a fresh one for each link",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Watch a peer beyond this machine over a link in clear.")
    ] = False,
    api_key_file: Annotated[
        str | None,
        typer.Option(help=f"A server's API key: a file that has it alone. Or {_API_KEY}.", show_default="none"),
    ] = None,
    ca: Annotated[
        str | None,
        typer.Option(help="Certificates that a server's is to be signed by, PEM.", show_default="this machine's"),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="An attested server: what is accepted, as of 'tsqp verify'.", show_default="none"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each interval.")] = False,
) -> None:
    """Watch a worker, a dealer or a server: requests, bytes, what waits, memory, and where the time goes.

    It shows what the peer says of itself, and asks for nothing else. Ctrl-C ends it.
    """
    with reported(as_json=json):
        if not _LEAST_S <= interval <= _MOST_S:
            raise ConfigError(f"--interval {interval:g}: expected seconds, from {_LEAST_S:g} to {_MOST_S:g}.")
        flags = {
            "worker": url,
            "worker_key": worker_key,
            "own_key": own_key,
            "insecure": "on" if insecure else None,
        }
        config = settings.load(EnclaveConfig, flags)
        address = config.worker or f"127.0.0.1:{DEFAULT_PORT}"
        if address.startswith(("http://", "https://")):
            source = _server(address, api_key_file, ca, policy, config.connect_timeout_s)
        else:
            if api_key_file or ca or policy:
                raise ConfigError("--api-key-file, --ca and --policy are for a server, http://... or https://...")
            from tsqp.top.worker import WorkerSource

            source = WorkerSource(address, config)
        with closing(source):
            _run(source, interval, once=once, as_json=json)


def _server(url: str, key_file: str | None, ca: str | None, policy: str | None, timeout_s: float) -> Source:
    if ca and policy:
        raise ConfigError("give --ca or --policy, not both: an attested server's certificate is its own.")
    try:
        from tsqp.top.server import ServerSource
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is not installed: run 'pip install tsqp[metrics]'.") from error
    context = None
    if policy:
        from tsqp.client import AttestedServer

        context = AttestedServer(url, policy).context()
    elif ca:
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise ConfigError(f"{ca} has no certificates in PEM form: {error.strerror or error}.") from error
    return ServerSource(url, _api_key(key_file), context, timeout_s)


def _api_key(file: str | None) -> str | None:
    """Return the key to ask with; no option takes it itself, which others on this machine could read."""
    if file is None:
        return os.environ.get(_API_KEY) or None
    try:
        key = Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the API key in {file}: {getattr(error, 'strerror', None) or error}.") from error
    if not key or len(key.split()) != 1:
        raise ConfigError(f"{file}: expected one API key and nothing else.")
    return key


def _run(source: Source, interval_s: float, *, once: bool, as_json: bool) -> None:
    from tsqp.top.watch import watch

    try:
        events = watch(source, interval_s)
        if once:
            _show_once(next(events), as_json=as_json)
        elif as_json:
            for event in events:
                _print_json(event)
        else:
            _show(source, interval_s, events)
    except KeyboardInterrupt:
        return


def _show_once(event: TopReport | TsqpError, *, as_json: bool) -> None:
    from tsqp.top.view import view

    if isinstance(event, TsqpError):
        raise event
    if as_json:
        print_json(event)
    else:
        console = Console(highlight=False)
        console.print(view(event, console.width))


def _print_json(event: TopReport | TsqpError) -> None:
    from tsqp.cli.reporting import error_report

    print_json(error_report(event) if isinstance(event, TsqpError) else event)


def _show(source: Source, interval_s: float, events: Iterator[TopReport | TsqpError]) -> None:
    """Show each report in the place of the last; where there is no terminal, below it."""
    from tsqp.top.view import opening, view

    console = Console(highlight=False)
    last: TopReport | None = None
    with _screen(console) as live:
        if live:
            live.update(opening(source.url, interval_s), refresh=True)
        for event in events:
            if not isinstance(event, TsqpError):
                last = event
                shown = view(event, console.width)
            elif last:
                shown = view(last, console.width, trouble=str(event))
            else:
                shown = opening(source.url, interval_s)
            if live:
                live.update(shown, refresh=True)
            elif isinstance(event, TsqpError):
                notice(f"no new numbers: {event}")
            else:
                console.print(shown)
                console.print()


@contextmanager
def _screen(console: Console) -> Iterator[Live | None]:
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield live
