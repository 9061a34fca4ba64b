"""A client of the first published protocol, written from docs/legacy-protocol.md alone.

It is what the published system ran: Hugging Face's model with every Linear and Embedding replaced by a blocking call,
tensors inside MessagePack, float32. It shares no code with our own wire, so that it also tests it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import zmq
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, LlamaForCausalLM

_MATMUL_ATTENTION = "tsqp_legacy_matmul"


class LegacyError(Exception):
    """The worker answered with an error."""


class LegacyClient:
    """A REQ socket and counters.

    Args:
        url: the worker's ``tcp://`` or ``ipc://`` address.
        timeout_s: how long to wait for any reply.
    """

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        self._socket.connect(url)
        self.round_trips = self.bytes_sent = self.bytes_received = 0

    def call(self, method: str, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its reply."""
        message = msgpack.packb({"method": method, "request": request})
        self._socket.send(message)
        raw = self._socket.recv()
        self.round_trips += 1
        self.bytes_sent += len(message)
        self.bytes_received += len(raw)
        reply = msgpack.unpackb(raw)
        if reply["status"] != "success":
            raise LegacyError(reply["error"])
        response: dict[str, Any] = reply["response"]
        return response

    def forward(self, module_name: str, x: Tensor) -> Tensor:
        """Run one module on the worker."""
        request = {
            "module_name": module_name,
            "input_buffer": x.numpy().tobytes(),
            "input_shape": list(x.shape),
            "dtype": str(x.dtype),
        }
        return _output(self.call("Forward", request))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply two activations on the worker."""
        request = {
            "a_buffer": a.contiguous().numpy().tobytes(),
            "a_shape": list(a.shape),
            "b_buffer": b.contiguous().numpy().tobytes(),
            "b_shape": list(b.shape),
            "dtype": str(a.dtype),
        }
        return _output(self.call("Matmul", request))

    def close(self) -> None:
        """Close the socket."""
        self._socket.close(linger=0)
        self._context.term()


def _output(response: dict[str, Any]) -> Tensor:
    array = np.frombuffer(bytearray(response["output_buffer"]), dtype=np.float32)
    return torch.from_numpy(array).reshape(response["output_shape"])


class RemoteModule(nn.Module):
    """Stands in for one Linear or Embedding."""

    def __init__(self, name: str, client: LegacyClient) -> None:
        super().__init__()
        self._name = name
        self._client = client

    def forward(self, x: Tensor) -> Tensor:
        """Call the worker and block."""
        return self._client.forward(self._name, x)


def build(directory: Path, client: LegacyClient, *, matmul: bool) -> LlamaForCausalLM:
    """Return Hugging Face's model with its large modules on the worker, as the published client builds it.

    Args:
        directory: holds ``config.json``; weights are not read.
        client: the connection.
        matmul: compute attention's two products on the worker too (the published client with eager attention).
    """
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    registered = client.call("RegisterClient", {"module_names": names})
    if not registered["ok"]:
        raise LegacyError(f"missing modules: {registered['missing_modules']}")
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, RemoteModule(name, client))
    model.to_empty(device="cpu")
    _fetch(model, client)
    if matmul:
        AttentionInterface.register(_MATMUL_ATTENTION, _matmul_attention(client))
    model.set_attn_implementation(_MATMUL_ATTENTION if matmul else "sdpa")
    model.eval()
    return model


def _fetch(model: LlamaForCausalLM, client: LegacyClient) -> None:
    """Fill norm weights and buffers with what the worker holds."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {
        "parameter_names": [name for name, _ in model.named_parameters()],
        "buffer_names": [name for name, _ in model.named_buffers()],
    }
    fetched = client.call("FetchNonLinearTensors", names)
    for item in (*fetched["parameters"], *fetched["buffers"]):
        array = np.frombuffer(bytearray(item["tensor_buffer"]), dtype=np.float32)
        own[item["name"]].data.copy_(torch.from_numpy(array).reshape(item["shape"]))


def _matmul_attention(client: LegacyClient) -> Any:  # noqa: ANN401  transformers' attention interface is untyped
    """Return eager attention whose two products are calls to the worker."""

    def attend(
        _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        scores = client.matmul(query, key.transpose(2, 3)) * scaling
        tokens = scores.shape[-1]
        causal = torch.full((tokens, tokens), float("-inf")).triu(1) if mask is None else mask
        weights = (scores + causal).softmax(dim=-1)
        return client.matmul(weights, value).transpose(1, 2).contiguous(), None

    return attend
