"""Round trip of one tensor to a process that echoes it, by wire format, on one machine. Prints JSON.

python benchmarks/wire_formats.py [--rounds 60] > benchmarks/results/wire-formats-DATE.json

Formats take turns within each round; medians. Both ends turn bytes into a tensor and back, as the real ones do.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime as dt
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import msgpack
import msgspec
import numpy as np
import torch
import zmq
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tsqp.bench import hardware
from tsqp.transport.client import open_client
from tsqp.transport.server import Server
from tsqp.transport.urls import Endpoint, parse
from tsqp.wire import codec, messages

SIZES = {"4 KB": 1 << 12, "1.5 MB": 128 * 3072 * 4, "8 MB": 1 << 23}
WARM_UP = 5
NO_LIMIT = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
Echo = Callable[[torch.Tensor], torch.Tensor]


def protobuf_message() -> Any:  # noqa: ANN401  made at run time
    """Build ``message Tensor { string dtype = 1; repeated int64 shape = 2; bytes data = 3; }`` without protoc."""
    file = descriptor_pb2.FileDescriptorProto(name="echo.proto", package="echo", syntax="proto3")
    message = file.message_type.add(name="Tensor")
    kinds = descriptor_pb2.FieldDescriptorProto
    message.field.add(name="dtype", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(name="shape", number=2, type=kinds.TYPE_INT64, label=kinds.LABEL_REPEATED)
    message.field.add(name="data", number=3, type=kinds.TYPE_BYTES, label=kinds.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("echo.Tensor"))


TENSOR = protobuf_message()


def to_protobuf(x: torch.Tensor) -> Any:  # noqa: ANN401
    return TENSOR(dtype="float32", shape=list(x.shape), data=x.numpy().tobytes())


def from_protobuf(message: Any) -> torch.Tensor:  # noqa: ANN401
    return torch.from_numpy(np.frombuffer(message.data, np.float32).copy()).view(*message.shape)


def to_map(x: torch.Tensor) -> dict[str, Any]:
    return {"buffer": x.numpy().tobytes(), "shape": list(x.shape)}


def from_map(message: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(message["buffer"], np.float32).copy()).view(*message["shape"])


def to_json(x: torch.Tensor) -> bytes:
    return json.dumps({"data": base64.b64encode(x.numpy().data).decode(), "shape": list(x.shape)}).encode()


def from_json(raw: bytes) -> torch.Tensor:
    message = json.loads(raw)
    return torch.frombuffer(bytearray(base64.b64decode(message["data"])), dtype=torch.float32).view(*message["shape"])


def endpoints(port: int) -> dict[str, Endpoint]:
    """Where protocol 3 is served."""
    return {
        "tcp": parse(f"127.0.0.1:{port}"),
        "shm": parse(f"shm://{tempfile.gettempdir()}/tsqp-wire-formats-{port}"),
    }


def serve_protocol_3(port: int) -> None:
    """Our own: MessagePack header, raw frames, no copies."""
    server = Server(list(endpoints(port).values()), codec.MAX_REPLY_HEADER_BYTES * 4)
    while True:
        incoming = server.receive(1.0)
        if incoming:
            request = codec.decode_request(incoming.frames)
            y = request.tensors[0]
            result = messages.Result(id=request.header.id, y=codec.spec_of(y), compute_ns=0)
            incoming.reply([messages.encode(result), codec.frame_of(y)])


def serve_map(port: int) -> None:
    """The first published protocol's form: the tensor inside one MessagePack map."""
    with zmq.Context() as context, context.socket(zmq.REP) as rep:
        rep.bind(f"tcp://127.0.0.1:{port}")
        while True:
            rep.send(msgpack.packb(to_map(from_map(msgpack.unpackb(rep.recv())))))


def serve_grpc(port: int) -> None:
    handler = grpc.unary_unary_rpc_method_handler(
        lambda request, _: to_protobuf(from_protobuf(request)), TENSOR.FromString, TENSOR.SerializeToString
    )
    server = grpc.server(futures.ThreadPoolExecutor(1), options=NO_LIMIT)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", {"Run": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


class JsonHandler(BaseHTTPRequestHandler):
    """Echoes base64 in JSON over a kept-alive HTTP/1.1 connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def do_POST(self) -> None:
        """Answer one tensor."""
        body = to_json(from_json(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


def serve_json(port: int) -> None:
    ThreadingHTTPServer(("127.0.0.1", port), JsonHandler).serve_forever()


@contextlib.contextmanager
def call_protocol_3(port: int, scheme: str) -> Iterator[Echo]:
    with contextlib.closing(open_client(endpoints(port)[scheme], codec.MAX_REPLY_HEADER_BYTES * 4)) as client:

        def echo(x: torch.Tensor) -> torch.Tensor:
            spec = codec.spec_of(x)
            header = messages.encode(messages.Linear(id=1, group="echo", x=spec))
            client.send([header, codec.frame_of(x)])
            reply, frames = codec.decode_reply(client.receive(60.0))
            assert isinstance(reply, messages.Result)
            return codec.claim(reply, frames, spec, "echo").unverified()

        yield echo


call_over_tcp, call_over_shm = (partial(call_protocol_3, scheme=scheme) for scheme in ("tcp", "shm"))


@contextlib.contextmanager
def call_map(port: int) -> Iterator[Echo]:
    with zmq.Context() as context, context.socket(zmq.REQ) as req:
        req.connect(f"tcp://127.0.0.1:{port}")

        def echo(x: torch.Tensor) -> torch.Tensor:
            req.send(msgpack.packb(to_map(x)))
            return from_map(msgpack.unpackb(req.recv()))

        yield echo


@contextlib.contextmanager
def call_grpc(port: int) -> Iterator[Echo]:
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=NO_LIMIT) as channel:
        run = channel.unary_unary("/echo.Echo/Run", TENSOR.SerializeToString, TENSOR.FromString)
        yield lambda x: from_protobuf(run(to_protobuf(x), wait_for_ready=True))


@contextlib.contextmanager
def call_json(port: int) -> Iterator[Echo]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:

        def echo(x: torch.Tensor) -> torch.Tensor:
            connection.request("POST", "/", to_json(x))
            return from_json(connection.getresponse().read())

        yield echo


FORMATS: dict[str, tuple[Callable[[int], None], Callable[[int], AbstractContextManager[Echo]]]] = {
    "protocol 3 over tcp: ZeroMQ, MessagePack header, raw frames": (serve_protocol_3, call_over_tcp),
    "protocol 3 over shm: the same in shared memory": (serve_protocol_3, call_over_shm),
    "ZeroMQ, tensor inside MessagePack (first protocol)": (serve_map, call_map),
    "gRPC, protobuf": (serve_grpc, call_grpc),
    "HTTP/1.1, JSON with base64": (serve_json, call_json),
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Wait until a server listens."""
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"the server on port {port} did not come up")


def measure(rounds: int) -> dict[str, Any]:
    """Measure every format at every size, in turns."""
    with contextlib.ExitStack() as stack:
        calls = {}
        for name, (_, call) in FORMATS.items():
            port = free_port()
            server = subprocess.Popen([sys.executable, __file__, "--serve", name, "--port", str(port)])
            stack.callback(server.wait)
            stack.callback(server.kill)
            wait_for(port)
            calls[name] = stack.enter_context(call(port))
        results = {}
        for label, size in SIZES.items():
            x = torch.randn(size // 4)
            taken: dict[str, list[float]] = {name: [] for name in calls}
            for turn in range(rounds + WARM_UP):
                for name, echo in calls.items():
                    started = time.perf_counter()
                    y = echo(x)
                    if turn >= WARM_UP:
                        taken[name].append(time.perf_counter() - started)
                    assert torch.equal(x, y)
            results[label] = {name: round(statistics.median(each) * 1e6, 1) for name, each in taken.items()}
    ours = next(iter(FORMATS))
    return {
        "date": dt.datetime.now(tz=dt.timezone.utc).date().isoformat(),
        "commit": hardware.commit(),
        "command": f"python benchmarks/wire_formats.py --rounds {rounds}",
        "hardware": msgspec.to_builtins(hardware.describe()),
        "transport": "one request at a time; tcp is loopback",
        "rounds": rounds,
        "median_us": results,
        "times_protocol_3": {
            label: {name: round(value / row[ours], 2) for name, value in row.items()} for label, row in results.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--serve", choices=sorted(FORMATS), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        FORMATS[arguments.serve][0](arguments.port)
    else:
        print(json.dumps(measure(arguments.rounds), indent=2))
