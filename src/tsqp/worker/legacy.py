"""Answers clients of the first published protocol (docs/legacy-protocol.md), at `open` only."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from tsqp.errors import DeviceMemoryError, InputError, ProtocolError
from tsqp.model.architecture import EMBEDDING_MODULE
from tsqp.model.layers import rope_frequencies
from tsqp.model.linears import Linears
from tsqp.wire import legacy
from tsqp.wire.codec import Buffer

_log = logging.getLogger(__name__)

# The buffers that a rotary embedding registers in Hugging Face's model.
_ROTARY_BUFFERS = ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")


class LegacyDispatcher:
    """Turns requests of the first protocol into replies, with the same weights as the current one.

    Args:
        linears: the model's large weights.
        state: its non-linear parameters by name.
    """

    def __init__(self, linears: Linears, state: dict[str, Tensor]) -> None:
        self._linears = linears
        self._parameters = state
        self._buffers = dict.fromkeys(_ROTARY_BUFFERS, rope_frequencies(linears.config))
        self._modules = {
            member: (group.name, index)
            for group in linears.groups.values()
            for index, member in enumerate(group.members)
        }

    def answer(self, frames: Sequence[Buffer]) -> list[Buffer]:
        """Return the reply to any frames at all."""
        if len(frames) != 1:
            return [legacy.failure(f"a request of the first protocol is one frame; {len(frames)} came.")]
        try:
            return [self._carry_out(legacy.decode_request(frames[0]))]
        except (ProtocolError, InputError, DeviceMemoryError) as error:
            return [legacy.failure(str(error))]
        except Exception:  # noqa: BLE001  a bug of ours must not end the worker for its other clients
            _log.exception("request of the first protocol failed")
            return [legacy.failure("the worker failed on this request; its log says how.")]

    def _carry_out(self, request: legacy.LegacyRequest) -> bytes:
        match request:
            case legacy.RegisterClient():
                return self._register(request)
            case legacy.FetchNonLinearTensors():
                return legacy.success(
                    {
                        "parameters": legacy.named(_pick(self._parameters, request.parameter_names)),
                        "buffers": legacy.named(_pick(self._buffers, request.buffer_names)),
                    }
                )
            case legacy.Forward():
                x = legacy.tensor(request.input_buffer, request.input_shape, request.dtype)
                return legacy.output(self._forward(request.module_name, x))
            case legacy.Matmul():
                a = legacy.tensor(request.a_buffer, request.a_shape, request.dtype)
                b = legacy.tensor(request.b_buffer, request.b_shape, request.dtype)
                return legacy.output(self._linears.matmul(a, b).cpu())

    def _register(self, request: legacy.RegisterClient) -> bytes:
        known = {*self._modules, EMBEDDING_MODULE}
        missing = [name for name in request.module_names if name not in known]
        return legacy.success(
            {
                "ok": not missing,
                "missing_modules": missing,
                "nonlinear_parameter_names": list(self._parameters),
                "nonlinear_buffer_names": list(self._buffers),
            }
        )

    def _forward(self, module: str, x: Tensor) -> Tensor:
        if module == EMBEDDING_MODULE:
            if x.dtype != torch.int64:
                raise InputError(f"{module} expects int64 ids, got {x.dtype}.")
            return self._linears.embedding(x.reshape(-1)).cpu().view(*x.shape, -1)
        if module not in self._modules:
            raise InputError(f"no Linear or Embedding module is named {module!r}.")
        if x.ndim == 0:
            raise InputError(f"{module} expects at least one dimension, got a scalar.")
        group, member = self._modules[module]
        y_MN = self._linears.linear(group, x.reshape(-1, x.shape[-1]), member)
        return y_MN.cpu().view(*x.shape[:-1], y_MN.shape[-1])


def refuse(_frames: Sequence[Buffer]) -> list[Buffer]:
    """Answer any request of the first protocol where there is no LLaMA in floats to serve it with."""
    return [
        legacy.failure(
            "the first protocol is served at the level open only; this process holds int8 codes, or a linear map. "
            "Start a worker with the model's float weights, without --exact."
        )
    ]


def _pick(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    if unknown := [name for name in names if name not in tensors]:
        raise InputError(f"no non-linear tensor is named {unknown[0]!r}.")
    return {name: tensors[name] for name in names}
