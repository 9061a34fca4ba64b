"""What a worker logs of requests, at debug: what they were, how large, how long; never what was in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import load_linears
from torch import Tensor

from tsqp import logs
from tsqp.arith.ring import lay_out
from tsqp.wire import codec, messages
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import DealerService, OpenService, WorkerService

CANARY = "xyzzy-plugh-secret"
NUMBER = 77713
QKV = "layers.0.qkv"
SEED = b"plugh-plugh-plugh-plugh-plugh-32"


@pytest.fixture(scope="module")
def service(tiny_llama: Path) -> OpenService:
    return OpenService(load_linears(tiny_llama), {})


def ask(service: WorkerService, header: messages.AnyRequest, *tensors: Tensor) -> messages.AnyReply:
    frames: list[codec.Buffer] = [messages.encode(header), *map(codec.frame_of, tensors)]
    return codec.decode_reply(Dispatcher(service, "tiny", "digest").answer(frames))[0]


def rows(service: WorkerService) -> Tensor:
    return torch.full((2, service.groups[QKV].in_features), float(NUMBER))


def test_a_request_is_logged_by_kind_group_rows_bytes_and_time(
    debug_logs: str, service: OpenService, capfd: pytest.CaptureFixture[str]
) -> None:
    x = rows(service)
    assert isinstance(ask(service, messages.Linear(id=12345, group=QKV, x=codec.spec_of(x)), x), messages.Result)
    (line,) = capfd.readouterr().err.splitlines()
    group = service.groups[QKV]
    size = len(messages.encode(messages.Linear(id=12345, group=QKV, x=codec.spec_of(x)))) + 2 * 4 * group.in_features
    what = f"linear, 2 rows by {QKV}: {size} bytes in, {2 * 4 * group.rows} out"
    assert what in line
    if debug_logs == "json":
        entry = json.loads(line)
        assert (entry["level"], entry["logger"], entry["request_id"]) == ("debug", "tsqp.worker.dispatch", 12345)
        assert entry["message"] == what
        assert entry["duration_s"] > 0
    else:
        assert "(request 12345, took " in line


def test_at_info_requests_are_not_logged(
    debug_logs: str, service: OpenService, capfd: pytest.CaptureFixture[str]
) -> None:
    logs.set_up("info", debug_logs)
    x = rows(service)
    ask(service, messages.Linear(id=1, group=QKV, x=codec.spec_of(x)), x)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("debug_logs")
def test_nothing_of_what_a_client_sends_is_logged(
    service: OpenService, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    x, ids = rows(service), torch.tensor([NUMBER])
    spec = codec.spec_of(x)
    ask(service, messages.Hello(id=1, software=CANARY))
    ask(service, messages.Linear(id=2, group=QKV, x=spec), x)
    ask(service, messages.Linear(id=3, group=CANARY, x=spec), x)
    refused = ask(service, messages.Embedding(id=4, ids=codec.spec_of(ids), dtype="float32"), ids)
    assert isinstance(refused, messages.Failure)
    dispatcher = Dispatcher(service, "tiny", "digest")
    for frames in ([], [CANARY.encode()], [messages.encode(messages.State(id=5)) + CANARY.encode()]):
        dispatcher.answer(frames)

    def fails(*_: object) -> Tensor:
        raise ValueError(f"{CANARY} {x}")

    monkeypatch.setattr(service, "operand", fails)
    failed = ask(service, messages.Linear(id=6, group=QKV, x=spec), x)
    assert isinstance(failed, messages.Failure)
    assert CANARY not in failed.message
    out, err = capfd.readouterr()
    assert out == ""
    for line in ("request refused (input)", "request refused (protocol)", "request failed"):
        assert line in err
    assert "ValueError" in err
    for each in (CANARY, str(NUMBER), str(float(NUMBER)), "tensor("):
        assert each not in err


@pytest.mark.usefixtures("debug_logs")
def test_a_dealer_does_not_log_seeds(service: OpenService, tiny_llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    group = load_linears(tiny_llama).groups[QKV]
    codes = lay_out(torch.ones(group.rows, group.in_features, dtype=torch.int8))
    dealer = DealerService([group], {QKV: codes}, service.device)
    for first in (0, (1 << 62) - 1):  # the latter is refused
        ask(dealer, messages.MaskProduct(id=1, group=QKV, seed=SEED, first=first, count=2))
    err = capfd.readouterr().err
    assert "maskproduct, 2 rows" in err
    assert "request refused (input)" in err
    for each in (SEED.decode(), SEED.hex(), repr(SEED)):
        assert each not in err
