"""The published client, unchanged, against our worker, beside clients of the current protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import torch
import zmq
from tiny_models import assert_same_logits, random_ids, reference_from, reference_logits
from workers import StartWorker

from tsqp.bench.legacy_client import LegacyClient, LegacyError, build


@pytest.fixture
def client(worker: StartWorker, tiny_llama: Path) -> Iterator[LegacyClient]:
    opened = LegacyClient("tcp://" + worker(tiny_llama, "tcp"))
    yield opened
    opened.close()


@pytest.mark.parametrize("matmul", [False, True], ids=["fused-attention", "matmul"])
def test_prefill_of_the_bundled_model_has_the_right_logits(
    worker: StartWorker, bundled_directory: Path, *, matmul: bool
) -> None:
    ids_BT = random_ids(1, 128, vocab_size=49152)
    client = LegacyClient("tcp://" + worker(bundled_directory, "tcp"))
    try:
        model = build(bundled_directory, client, matmul=matmul)
        before = client.round_trips
        logits_BTV = reference_logits(model, ids_BT)
        calls = client.round_trips - before
    finally:
        client.close()
    assert calls == 212 + (60 if matmul else 0)
    assert_same_logits(logits_BTV, reference_logits(reference_from(bundled_directory), ids_BT))


def test_registration_names_what_is_missing(client: LegacyClient) -> None:
    answer = client.call("RegisterClient", {"module_names": ["lm_head", "model.layers.99.mlp.up_proj"]})
    assert answer["ok"] is False
    assert answer["missing_modules"] == ["model.layers.99.mlp.up_proj"]
    assert "model.norm.weight" in answer["nonlinear_parameter_names"]
    assert "model.rotary_emb.inv_freq" in answer["nonlinear_buffer_names"]


@pytest.mark.parametrize("dtype", ["torch.float32", "float32", "torch.float16", "torch.bfloat16"])
def test_forward_takes_every_dtype_and_answers_float32(client: LegacyClient, dtype: str) -> None:
    x = torch.randn(2, 3, 48)
    stored = x.half() if dtype.endswith("float16") and "bfloat" not in dtype else x
    request = {
        "module_name": "model.layers.0.self_attn.q_proj",
        "input_buffer": stored.numpy().tobytes(),
        "input_shape": [2, 3, 48],
        "dtype": dtype,
    }
    answer = client.call("Forward", request)
    assert answer["dtype"] == "torch.float32"
    assert answer["output_shape"] == [2, 3, 48]
    assert len(answer["output_buffer"]) == 2 * 3 * 48 * 4


BAD = {
    "unknown-method": ("Explode", {}, "unknown method"),
    "unknown-module": (
        "Forward",
        {"module_name": "no.such", "input_buffer": b"\0" * 4, "input_shape": [1], "dtype": "float32"},
        "no.such",
    ),
    "short-buffer": (
        "Forward",
        {"module_name": "lm_head", "input_buffer": b"\0" * 4, "input_shape": [1, 48], "dtype": "float32"},
        "192 bytes",
    ),
    "unknown-tensor": ("FetchNonLinearTensors", {"parameter_names": ["x"], "buffer_names": []}, "'x'"),
}


@pytest.mark.parametrize(("method", "request_body", "message"), BAD.values(), ids=BAD)
def test_bad_requests_get_an_error_and_the_worker_goes_on(
    client: LegacyClient, method: str, request_body: dict[str, object], message: str
) -> None:
    with pytest.raises(LegacyError, match=message):
        client.call(method, request_body)
    assert client.call("RegisterClient", {"module_names": []})["ok"] is True


def test_garbage_gets_an_error_in_the_first_protocols_form(worker: StartWorker, tiny_llama: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 10_000)
        socket.connect("tcp://" + worker(tiny_llama, "tcp"))
        socket.send(b"\xff\xfe not msgpack")
        assert msgpack.unpackb(socket.recv())["status"] == "error"
