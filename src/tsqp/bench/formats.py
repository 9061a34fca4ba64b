"""Other wire formats, to compare ours with: a server that echoes one tensor, and a client, of each.

Both ends turn bytes into a tensor and back, as a program that computes on it must. ``python -m tsqp.bench.formats NAME
PORT`` serves one on 127.0.0.1 until it is killed.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
import zmq
from torch import Tensor

Echo = Callable[[Tensor], Tensor]

_NO_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_PATH = "/echo.Echo/Run"


@dataclass(frozen=True, slots=True)
class Format:
    """One wire format.

    Attributes:
        settings: what it is, for the report.
        needs: what to install for it.
        serve: answers on a port for ever.
        call: connects to that port and yields a function that sends a tensor and returns the answer.
    """

    settings: str
    needs: str
    serve: Callable[[int], None]
    call: Callable[[int], AbstractContextManager[Echo]]


def _protobuf_message() -> Any:  # noqa: ANN401  made at run time
    """Build ``message Tensor { string dtype = 1; repeated int64 shape = 2; bytes data = 3; }`` without protoc."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415  the extra grpc

    file = descriptor_pb2.FileDescriptorProto(name="echo.proto", package="echo", syntax="proto3")
    message = file.message_type.add(name="Tensor")
    kinds = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="dtype", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(name="shape", number=2, type=kinds.TYPE_INT64, label=kinds.LABEL_REPEATED)
    message.field.add(name="data", number=3, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("echo.Tensor"))


def _to_protobuf(kind: Any, x: Tensor) -> Any:  # noqa: ANN401
    return kind(dtype="float32", shape=list(x.shape), data=x.numpy().tobytes())


def _from_protobuf(message: Any) -> Tensor:  # noqa: ANN401
    return torch.from_numpy(np.frombuffer(message.data, np.float32).copy()).view(*message.shape)


def _serve_grpc(port: int) -> None:
    import grpc  # noqa: PLC0415  the extra grpc

    kind = _protobuf_message()
    handler = grpc.unary_unary_rpc_method_handler(
        lambda request, _: _to_protobuf(kind, _from_protobuf(request)), kind.FromString, kind.SerializeToString
    )
    server = grpc.server(futures.ThreadPoolExecutor(1), options=_NO_LIMIT)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Run": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


@contextlib.contextmanager
def _call_grpc(port: int) -> Iterator[Echo]:
    import grpc  # noqa: PLC0415  the extra grpc

    kind = _protobuf_message()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=_NO_LIMIT) as channel:
        run = channel.unary_unary(_PATH, kind.SerializeToString, kind.FromString)
        yield lambda x: _from_protobuf(run(_to_protobuf(kind, x), wait_for_ready=True))


def _to_map(x: Tensor) -> dict[str, Any]:
    return {"buffer": x.numpy().tobytes(), "shape": list(x.shape)}


def _from_map(message: dict[str, Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(message["buffer"], np.float32).copy()).view(*message["shape"])


def _serve_map(port: int) -> None:
    import msgpack  # noqa: PLC0415  the extra bench

    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.bind(f"tcp://127.0.0.1:{port}")
        while True:
            socket.send(msgpack.packb(_to_map(_from_map(msgpack.unpackb(socket.recv())))))


@contextlib.contextmanager
def _call_map(port: int) -> Iterator[Echo]:
    import msgpack  # noqa: PLC0415  the extra bench

    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.connect(f"tcp://127.0.0.1:{port}")

        def echo(x: Tensor) -> Tensor:
            socket.send(msgpack.packb(_to_map(x)))
            return _from_map(msgpack.unpackb(socket.recv()))

        yield echo


def _to_json(x: Tensor) -> bytes:
    return json.dumps({"data": base64.b64encode(x.numpy().data).decode(), "shape": list(x.shape)}).encode()


def _from_json(raw: bytes) -> Tensor:
    message = json.loads(raw)
    return torch.frombuffer(bytearray(base64.b64decode(message["data"])), dtype=torch.float32).view(*message["shape"])


class _JsonHandler(BaseHTTPRequestHandler):
    """Echoes base64 in JSON over a kept-alive HTTP/1.1 connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self) -> None:
        """Answer one tensor."""
        body = _to_json(_from_json(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def _serve_json(port: int) -> None:
    ThreadingHTTPServer(("127.0.0.1", port), _JsonHandler).serve_forever()


@contextlib.contextmanager
def _call_json(port: int) -> Iterator[Echo]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:

        def echo(x: Tensor) -> Tensor:
            connection.request("POST", "/", _to_json(x))
            return _from_json(connection.getresponse().read())

        yield echo


FORMATS = {
    "MessagePack": Format(
        "the first protocol: the tensor inside one MessagePack map, ZeroMQ REQ and REP over tcp",
        "msgpack: pip install 'tsqp[bench]'",
        _serve_map,
        _call_map,
    ),
    "gRPC": Format(
        "protobuf, the tensor as bytes, over tcp",
        "grpcio and protobuf: pip install 'tsqp[grpc]'",
        _serve_grpc,
        _call_grpc,
    ),
    "HTTP JSON": Format("HTTP/1.1 over tcp, the tensor as base64 in JSON", "", _serve_json, _call_json),
}


if __name__ == "__main__":
    FORMATS[sys.argv[1]].serve(int(sys.argv[2]))
