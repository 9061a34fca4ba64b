"""Answers one request of the current protocol. Pure but for the service's products: frames in, frames out."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from tsqp import __version__
from tsqp.errors import DeviceMemoryError, InputError, InternalError, ProtocolError, TsqpError
from tsqp.model.architecture import module_count
from tsqp.wire import codec, messages
from tsqp.wire.codec import Buffer
from tsqp.wire.messages import AnyRequest, Failure, GroupSpec, Reply
from tsqp.worker.services import WorkerService

_log = logging.getLogger(__name__)
_envelope = msgspec.msgpack.Decoder(messages.Envelope)


class Dispatcher:
    """Turns requests into replies for one model.

    Args:
        service: computes the products.
        model: the name or path it was started with; clients are shown the last part.
        digest: the model's digest; of int8 codes, theirs.
    """

    def __init__(self, service: WorkerService, model: str, digest: str) -> None:
        self.service = service
        self._instance = os.urandom(16).hex()
        self._model = codec.printable(Path(model).name)[: messages.MAX_NAME] or "model"
        self.digest = digest
        self._started = time.monotonic()
        self.requests: Counter[str] = Counter()
        self.errors = self.bytes_received = self.bytes_sent = self.compute_ns = 0

    def answer(self, frames: Sequence[Buffer]) -> list[Buffer]:
        """Return the reply to any frames at all: what is not a valid request is answered with a failure."""
        self.bytes_received += sum(map(len, frames))
        try:
            request = codec.decode_request(frames)
            self.requests[type(request.header).__name__.lower()] += 1
            reply = self._carry_out(request.header, request.tensors)
        except codec.VersionError as error:
            reply = self._failure(error.request_id, "version", error)
        except ProtocolError as error:
            reply = self._failure(_request_id(frames), "protocol", error)
        except Exception:  # noqa: BLE001  a bug of ours must not end the worker for its other clients
            _log.exception("request failed")
            sorry = InternalError("the worker failed on this request; its log says how.")
            reply = self._failure(_request_id(frames), "internal", sorry)
        self.bytes_sent += sum(map(len, reply))
        return reply

    def _carry_out(self, header: AnyRequest, tensors: tuple[Tensor, ...]) -> list[Buffer]:
        try:
            match header:
                case messages.Hello():
                    return [messages.encode(self._welcome(header.id))]
                case messages.Stats():
                    return [messages.encode(self._stats(header.id))]
                case messages.State():
                    return self._state_reply(header.id)
                case _:
                    return self._product(header, tensors)
        except DeviceMemoryError as error:
            return self._failure(header.id, "memory", error)
        except InputError as error:
            return self._failure(header.id, "input", error)

    def _product(self, header: AnyRequest, tensors: tuple[Tensor, ...]) -> list[Buffer]:
        """Compute and time one product."""
        started = time.perf_counter_ns()
        y = self.service.product(header, tensors).contiguous()
        elapsed = time.perf_counter_ns() - started
        self.compute_ns += elapsed
        result = messages.Result(id=header.id, y=codec.spec_of(y), compute_ns=elapsed)
        return [messages.encode(result), codec.frame_of(y)]

    def _state_reply(self, request_id: int) -> list[Buffer]:
        if self.service.serves != "open":
            raise InputError("norm weights are given away at the level open only; this process does not have them.")
        state = self.service.state
        reply = messages.StateResult(
            id=request_id, names=tuple(state), tensors=tuple(map(codec.spec_of, state.values()))
        )
        return [messages.encode(reply), *map(codec.frame_of, state.values())]

    def _welcome(self, request_id: int) -> Reply:
        service = self.service
        groups = tuple(
            GroupSpec(group.name, group.members, group.in_features, group.out_features)
            for group in service.groups.values()
        )
        return messages.Welcome(
            id=request_id,
            software=f"tsqp {__version__}",
            instance=self._instance,
            serves=service.serves,
            model=self._model,
            model_digest=self.digest,
            device=str(service.device),
            dtype=codec.dtype_name(service.dtype),
            module_count=module_count(service.groups.values()),
            groups=groups,
        )

    def _stats(self, request_id: int) -> Reply:
        return messages.StatsResult(
            id=request_id,
            uptime_s=time.monotonic() - self._started,
            requests=dict(self.requests),
            errors=self.errors,
            bytes_received=self.bytes_received,
            bytes_sent=self.bytes_sent,
            compute_s=self.compute_ns / 1e9,
        )

    def _failure(self, request_id: int, code: messages.ErrorCode, error: TsqpError) -> list[Buffer]:
        self.errors += 1
        return [messages.encode(Failure(id=request_id, code=code, message=str(error)[:2048]))]


def _request_id(frames: Sequence[Buffer]) -> int:
    """Read the id of a request that is otherwise invalid, so that its sender learns of it; 0 if there is none."""
    try:
        return _envelope.decode(frames[0]).id if frames and len(frames[0]) <= codec.MAX_REQUEST_HEADER_BYTES else 0
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
