"""``python -m tsqp.serve.demo_worker``: an ordinary worker that also tells what it sees. Started by ``tsqp demo`` only.

It answers every request as ``tsqp worker`` does. Beside that it plays the curious operator: it keeps what it is sent,
tries to read it, and publishes both for the page.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
import zmq

from tsqp import config as settings
from tsqp.cli.reporting import notes, print_json, progress, reported
from tsqp.config import WorkerConfig
from tsqp.errors import SetupError
from tsqp.launch import ending_with_parent
from tsqp.serve.view import encode
from tsqp.threads import set_threads, share_cores

if TYPE_CHECKING:
    from tsqp.audit.public import TokenTable
    from tsqp.model.tokenizer import Tokenizer
    from tsqp.serve.observer import Observer
    from tsqp.worker.startup import RunningWorker

_PUBLISH_S = 0.15
# With nothing new, so many turns pass between two snapshots: whoever opens the page late waits for one.
_REPEAT_EVERY = 7


class DemoWorkerReady(msgspec.Struct, frozen=True):
    """Printed once, when requests are answered."""

    endpoints: list[str]


def main(
    listen: Annotated[str, typer.Option(help="Address to listen on.")],
    view: Annotated[str, typer.Option(help="Address to publish on, ipc:///path.")],
    model: Annotated[str | None, typer.Option(help="As tsqp worker takes it.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Serve int8 codes.")] = False,  # noqa: FBT002
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
) -> None:
    """Serve one demonstration, until standard input closes."""
    with reported(as_json=True):
        flags = {
            "model": model,
            "serves": "exact" if exact else None,
            "listen": (listen,),
            "device": "cpu",
            "dtype": dtype,
            "threads": threads,
        }
        config = settings.load(WorkerConfig, flags)
        share_cores()
        from tsqp.worker.startup import Progress, open_worker  # noqa: PLC0415  torch loads after share_cores()

        with progress() as step, ending_with_parent(sys.stdin.fileno()):
            report = Progress(lambda text: notes.print(text, markup=False), step)
            running = open_worker(config, report, sys.stdin.fileno())
            try:
                watching = published(observe(running, config), view)
            except BaseException:
                running.transport.close()
                raise
        with watching:
            print_json(DemoWorkerReady([endpoint.url for endpoint in running.endpoints]))
            running.serve()


def observe(running: RunningWorker, config: WorkerConfig) -> Observer:
    """Put an observer between a worker's transport and its products."""
    from tsqp.serve.observer import ObservedDispatcher, Observer  # noqa: PLC0415  torch loads after share_cores()

    plain = running.worker.dispatcher
    tokenizer, table = _public(config, reads_ids=running.serves == "open")
    observer = Observer(running.serves, tokenizer, table)
    observed = ObservedDispatcher(plain.service, config.model, plain.digest, observer)
    observed.queue = plain.queue
    running.worker.dispatcher = observed
    return observer


def _public(config: WorkerConfig, *, reads_ids: bool) -> tuple[Tokenizer | None, TokenTable | None]:
    """Read what everybody has of a published model: its tokenizer and, where rows must be guessed, its embeddings."""
    from tsqp.audit.public import TokenTable  # noqa: PLC0415
    from tsqp.model.layers import rms_norm  # noqa: PLC0415
    from tsqp.model.locate import locate, locate_packed  # noqa: PLC0415
    from tsqp.model.packed import open_enclave  # noqa: PLC0415
    from tsqp.model.tokenizer import Tokenizer, find_tokenizer  # noqa: PLC0415

    if reads_ids:
        return find_tokenizer(locate(config.model)), None
    packed = open_enclave(locate_packed(config.model))
    norm_D = packed.state["model.layers.0.input_layernorm.weight"]
    table = TokenTable(rms_norm(packed.embedding_VD.float(), norm_D, packed.config.rms_norm_eps))
    return Tokenizer(packed.tokenizer_json) if packed.tokenizer_json else None, table


@contextmanager
def published(observer: Observer, endpoint: str) -> Iterator[None]:
    """Publish what an observer has seen several times a second, for the time of a ``with`` block.

    Raises:
        SetupError: the address cannot be bound.
    """
    context = zmq.Context()
    socket = context.socket(zmq.PUB)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 2)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise SetupError(f"cannot publish on {endpoint}: {error.strerror}.") from error
        stop = threading.Event()
        thread = threading.Thread(target=_publish, args=(observer, socket, stop), name="view", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
    finally:
        socket.close()
        context.term()


def _publish(observer: Observer, socket: zmq.Socket[bytes], stop: threading.Event) -> None:
    set_threads(1)  # of this thread: the others are for products
    last, turns = b"", 0
    while not stop.wait(_PUBLISH_S):
        message = encode(observer.snapshot())
        turns += 1
        if message != last or turns >= _REPEAT_EVERY:
            socket.send(message, zmq.NOBLOCK)
            last, turns = message, 0


if __name__ == "__main__":
    typer.run(main)
