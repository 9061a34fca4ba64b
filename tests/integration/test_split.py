"""The split against the reference and against `local`, with a real worker process over every transport."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    LLAMA3_ROPE,
    assert_same_logits,
    load_llama,
    random_ids,
    reference_from,
    reference_logits,
    tiny_checkpoint,
)
from workers import StartWorker, linked

from tsqp.config import EnclaveConfig
from tsqp.errors import ModelMismatchError
from tsqp.model.architecture import linear_groups, module_count, read_config
from tsqp.model.llama import Llama
from tsqp.model.tokenizer import read_tokenizer
from tsqp.prefill import SAMPLE_TEXT
from tsqp.wire import codec, messages

SCHEMES = ("shm", "ipc", "tcp")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    "head_dim-llama3": {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def text_ids(bundled_directory: Path) -> torch.Tensor:
    """Over 200 tokens of ordinary text."""
    ids = read_tokenizer(bundled_directory).encode(SAMPLE_TEXT * 4)
    assert len(ids) >= 200
    return torch.tensor([ids[:256]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bundled_model_agrees_with_transformers(
    worker: StartWorker, bundled_directory: Path, text_ids: torch.Tensor, scheme: str
) -> None:
    with linked(worker(bundled_directory, scheme), bundled_directory) as link:
        logits_BTV = Llama(read_config(bundled_directory), link.ops).prefill(text_ids, all_logits=True)
    assert_same_logits(logits_BTV, reference_logits(reference_from(bundled_directory), text_ids))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tiny_models_agree_with_transformers(worker: StartWorker, tmp_path: Path, options: dict[str, Any]) -> None:
    directory = tiny_checkpoint(tmp_path / "model", **options)
    ids_BT = random_ids(2, 40)
    with linked(worker(directory), directory) as link:
        logits_BTV = Llama(read_config(directory), link.ops).prefill(ids_BT, all_logits=True)
    assert_same_logits(logits_BTV, reference_logits(reference_from(directory), ids_BT))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_open_equals_local(worker: StartWorker, tiny_llama: Path, dtype: str) -> None:
    """Both sides run the same kernels on the same numbers: at worst the last bits differ between thread counts."""
    ids_BT = random_ids(1, 33)
    with linked(worker(tiny_llama, dtype=dtype), tiny_llama, EnclaveConfig(dtype=dtype)) as link:
        split_BTV = Llama(read_config(tiny_llama), link.ops).prefill(ids_BT, all_logits=True)
    local_BTV = load_llama(tiny_llama, codec.TORCH_DTYPES[dtype]).prefill(ids_BT, all_logits=True)
    assert_same_logits(split_BTV, local_BTV, tolerance=16 * torch.finfo(codec.TORCH_DTYPES[dtype]).eps)


def test_offloaded_attention_agrees_and_costs_two_more_round_trips_a_layer(
    worker: StartWorker, tiny_llama: Path
) -> None:
    architecture, ids_BT = read_config(tiny_llama), random_ids(2, 21)
    with linked(worker(tiny_llama), tiny_llama) as link:
        plain = Llama(architecture, link.ops)
        before = link.session.meter.round_trips
        expected = plain.prefill(ids_BT, all_logits=True)
        between = link.session.meter.round_trips
        offloaded = Llama(architecture, link.ops, offload_attention=True)
        fetched = link.session.meter.round_trips
        assert_same_logits(offloaded.prefill(ids_BT, all_logits=True), expected)
        after = link.session.meter.round_trips
    assert between - before == architecture.layers + 2
    assert after - fetched == 3 * architecture.layers + 2


def test_a_prefill_of_the_bundled_model_takes_32_round_trips_for_212_modules(
    worker: StartWorker, bundled_directory: Path
) -> None:
    architecture = read_config(bundled_directory)
    with linked(worker(bundled_directory), bundled_directory) as link:
        model = Llama(architecture, link.ops)
        before = link.session.meter.round_trips
        model.prefill(torch.tensor([[1, 2, 3]]))
        assert link.session.meter.round_trips - before == 32
        assert link.welcome.module_count == module_count(linear_groups(architecture)) == 212


def test_last_logits_are_the_last_of_all(worker: StartWorker, tiny_llama: Path) -> None:
    ids_BT = random_ids(3, 17)
    with linked(worker(tiny_llama), tiny_llama) as link:
        model = Llama(read_config(tiny_llama), link.ops)
        every, last = model.prefill(ids_BT, all_logits=True), model.prefill(ids_BT)
    assert_same_logits(last, every[:, -1], tolerance=1e-5)


def test_many_requests_in_flight_come_back_to_their_own_callers(worker: StartWorker, tiny_llama: Path) -> None:
    architecture = read_config(tiny_llama)
    group = linear_groups(architecture)[0]
    inputs = [torch.randn(rows, group.in_features) for rows in range(1, 65)]
    with linked(worker(tiny_llama), tiny_llama) as link:
        expected = [link.ops.linear(group.name, x)() for x in inputs]

        def submit(x: torch.Tensor) -> int:
            header = partial(messages.Linear, group=group.name, x=codec.spec_of(x))
            return link.session.submit(lambda i: header(id=i), [codec.frame_of(x)])

        in_flight = list(map(submit, inputs))
        for request_id, wanted in reversed(list(zip(in_flight, expected, strict=True))):
            reply, frames = link.session.result(request_id, messages.Result)
            got = codec.claim(reply, frames, codec.spec_of(wanted), "linear").unverified()
            torch.testing.assert_close(got, wanted)


def test_a_worker_with_another_model_is_refused(worker: StartWorker, tiny_llama: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(ModelMismatchError, match="digest"), linked(worker(tiny_llama), other):
        pass


def test_a_worker_with_another_dtype_is_refused(worker: StartWorker, tiny_llama: Path) -> None:
    with (
        pytest.raises(ModelMismatchError, match=r"float32.*bfloat16"),
        linked(worker(tiny_llama), tiny_llama, EnclaveConfig(dtype="bfloat16")),
    ):
        pass


def test_a_worker_counts_what_it_did(worker: StartWorker, tiny_llama: Path) -> None:
    with linked(worker(tiny_llama), tiny_llama) as link:
        Llama(read_config(tiny_llama), link.ops).prefill(random_ids(1, 5))
        stats, _ = link.session.result(link.session.submit(lambda i: messages.Stats(id=i)), messages.StatsResult)
    layers = read_config(tiny_llama).layers
    assert stats.requests["linear"] >= 1
    assert stats.requests["linearchain"] >= layers
    assert stats.bytes_received > 0
    assert stats.bytes_sent > 0
