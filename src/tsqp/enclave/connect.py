"""Meets a worker: connects, compares protocol and model, and returns ready ``OpenOps``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tsqp.config import EnclaveConfig
from tsqp.enclave.remote_ops import OpenOps
from tsqp.enclave.session import Session, check_worker
from tsqp.model.architecture import LlamaConfig
from tsqp.transport.client import open_client
from tsqp.transport.urls import parse
from tsqp.wire import codec
from tsqp.wire.messages import Welcome


@dataclass(frozen=True, slots=True)
class Link:
    """An open connection to a worker that holds the right model."""

    session: Session
    ops: OpenOps
    welcome: Welcome


@contextmanager
def connect(worker: str, config: EnclaveConfig, architecture: LlamaConfig, digest: str) -> Iterator[Link]:
    """Connect to a worker for the time of a ``with`` block.

    Args:
        worker: its address.
        config: timeouts and dtype.
        architecture: the model's architecture.
        digest: the model's digest.

    Raises:
        TransportError: nothing answers there.
        ProtocolError, ModelMismatchError: what answers is not the right worker.
    """
    session = Session(open_client(parse(worker), config.max_message_bytes), config.request_timeout_s)
    try:
        welcome = session.hello(config.connect_timeout_s)
        check_worker(welcome, architecture, digest, config.dtype, session.peer)
        yield Link(session, OpenOps(session, architecture, codec.TORCH_DTYPES[config.dtype]), welcome)
    finally:
        session.close()
