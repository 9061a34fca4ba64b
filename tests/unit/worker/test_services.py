"""What each kind of process answers, what it refuses, and that a dealer's products are those of its seed's rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import load_linears
from torch import Tensor
from workers import packed_tiny

from tsqp.arith import ring
from tsqp.arith.keystream import keystream_rows
from tsqp.errors import InputError
from tsqp.model.ops import read_state
from tsqp.model.packed import open_codes
from tsqp.model.weights import Checkpoint
from tsqp.wire import codec, messages
from tsqp.wire.messages import TensorSpec
from tsqp.worker.dispatch import Dispatcher
from tsqp.worker.services import DealerService, ExactService, OpenService, WorkerService

CPU = torch.device("cpu")
SEED = bytes(range(32))
GROUP = "layers.1.o"
CHAIN = (GROUP, "layers.1.gate_up", "layers.1.down", "layers.2.qkv")


@pytest.fixture(scope="module")
def codes(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    packed = open_codes(packed_tiny(tiny_llama, tmp_path_factory.mktemp("services") / "packed"))
    return {group.name: packed.read(group.name) for group in packed.groups}


@pytest.fixture(scope="module")
def groups(tiny_llama: Path) -> Any:
    return tuple(load_linears(tiny_llama).groups.values())


@pytest.fixture(scope="module")
def services(tiny_llama: Path, codes: dict[str, Tensor], groups: Any) -> dict[str, WorkerService]:
    laid_out = {name: ring.lay_out(codes_NK) for name, codes_NK in codes.items()}
    linears = load_linears(tiny_llama)
    return {
        "open": OpenService(linears, read_state(linears, Checkpoint(tiny_llama))),
        "exact": ExactService(groups, laid_out, CPU),
        "masks": DealerService(groups, laid_out, CPU),
    }


REQUESTS: dict[str, tuple[str, messages.AnyRequest, tuple[Tensor, ...]]] = {
    "linear": ("open", messages.Linear(id=1, group=GROUP, x=TensorSpec("float32", (2, 48))), (torch.zeros(2, 48),)),
    "linear_chain": (
        "open",
        messages.LinearChain(id=1, groups=CHAIN, x=TensorSpec("float32", (2, 96))),
        (torch.zeros(2, 96),),
    ),
    "linear_exact": (
        "exact",
        messages.LinearExact(id=1, group=GROUP, x=TensorSpec("int32", (2, 48))),
        (torch.zeros(2, 48, dtype=torch.int32),),
    ),
    "codes": ("exact", messages.Codes(id=1, group=GROUP, first=0, rows=3), ()),
    "mask_product": ("masks", messages.MaskProduct(id=1, group=GROUP, seed=SEED, first=0, count=2), ()),
}


@pytest.mark.parametrize("serves", ["open", "exact", "masks"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_each_service_answers_its_own_requests_only(
    services: dict[str, WorkerService], serves: str, request_name: str
) -> None:
    owner, header, tensors = REQUESTS[request_name]
    if owner == serves:
        assert services[serves].product(header, tensors).device == CPU
    else:
        with pytest.raises(InputError, match=f"a {type(header).__name__} request came to a process that serves"):
            services[serves].product(header, tensors)


def test_exact_products_and_codes_are_the_models(services: dict[str, WorkerService], codes: dict[str, Tensor]) -> None:
    x_MK = torch.randint(-(1 << 31), (1 << 31) - 1, (5, 48)).int()
    header = messages.LinearExact(id=1, group=GROUP, x=codec.spec_of(x_MK))
    assert torch.equal(services["exact"].product(header, (x_MK,)), ring.multiply(x_MK, ring.lay_out(codes[GROUP])))
    asked = messages.Codes(id=1, group=GROUP, first=7, rows=4)
    assert torch.equal(services["exact"].product(asked, ()), codes[GROUP][7:11])


def test_mask_products_are_those_of_the_seeds_rows_of_that_group(
    services: dict[str, WorkerService], codes: dict[str, Tensor]
) -> None:
    number = list(codes).index(GROUP)
    header = messages.MaskProduct(id=1, group=GROUP, seed=SEED, first=11, count=3)
    r_MK = keystream_rows(SEED, number, 11, 3, 48)
    assert torch.equal(services["masks"].product(header, ()), ring.multiply(r_MK, ring.lay_out(codes[GROUP])))


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        (messages.Codes(id=1, group=GROUP, first=40, rows=9), (), "codes of layers.1.o have 48 rows; rows up to 49"),
        (messages.Codes(id=1, group="no", first=0, rows=1), (), "no linear group is named 'no'"),
        (
            messages.LinearExact(id=1, group=GROUP, x=TensorSpec("int32", (1, 47))),
            (torch.zeros(1, 47, dtype=torch.int32),),
            r"expects int32 of shape \[M, 48\], got torch.int32 \[1, 47\]",
        ),
        (
            messages.LinearExact(id=1, group=GROUP, x=TensorSpec("float32", (1, 48))),
            (torch.zeros(1, 48),),
            "got torch.float32",
        ),
        (
            messages.LinearExact(id=1, group=GROUP, x=TensorSpec("int32", (1 << 24, 0))),
            (torch.zeros(1 << 24, 0, dtype=torch.int32),),
            "expects int32",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    services: dict[str, WorkerService], header: messages.AnyRequest, tensors: tuple[Tensor, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        services["exact"].product(header, tensors)


def test_a_few_bytes_cannot_claim_much_memory(services: dict[str, WorkerService]) -> None:
    codes = services["masks"].groups[GROUP]
    most = messages.most_mask_rows(codes.in_features, codes.rows)
    asked = messages.MaskProduct(id=1, group=GROUP, seed=SEED, first=0, count=most)
    assert len(services["masks"].product(asked, ())) == most
    with pytest.raises(InputError, match=f"{most + 1} rows were asked for; at most {most} are given at once"):
        services["masks"].product(msgspec.structs.replace(asked, count=most + 1), ())


def test_codes_are_given_in_parts(services: dict[str, WorkerService], monkeypatch: pytest.MonkeyPatch) -> None:
    group = services["exact"].groups[GROUP]
    monkeypatch.setattr(messages, "MAX_UNPAID_BYTES", 6 * group.in_features)
    assert len(services["exact"].product(messages.Codes(id=1, group=GROUP, first=0, rows=3), ())) == 3
    with pytest.raises(InputError, match="4 rows were asked for; at most 3 are given at once"):
        services["exact"].product(messages.Codes(id=1, group=GROUP, first=0, rows=4), ())


@settings(deadline=None)
@given(
    group=st.sampled_from([GROUP, "head", "x"]),
    dtype=st.sampled_from(["int32", "int8", "float32", "int64"]),
    shape=st.lists(st.sampled_from([0, 1, 3, 48]), max_size=3).map(tuple),
    first=st.sampled_from([0, 1, 1 << 31, (1 << 62) - 1]),
    count=st.sampled_from([0, 1, 1 << 31]),
)
def test_any_request_gives_a_result_or_a_failure(
    services: dict[str, WorkerService], group: str, dtype: Any, shape: Any, first: int, count: int
) -> None:
    frame = bytes(math.prod(shape) * codec.TORCH_DTYPES[dtype].itemsize)
    requests: list[tuple[messages.AnyRequest, list[bytes]]] = [
        (messages.LinearExact(id=1, group=group, x=TensorSpec(dtype, shape)), [frame]),
        (messages.Codes(id=1, group=group, first=min(first, 1 << 31), rows=count), []),
        (messages.MaskProduct(id=1, group=group, seed=SEED, first=first, count=count), []),
        (messages.State(id=1), []),
    ]
    for serves in ("exact", "masks"):
        for header, frames in requests:
            dispatcher = Dispatcher(services[serves], "tiny", "digest")
            reply, _ = codec.decode_reply(dispatcher.answer([messages.encode(header), *frames]))
            assert isinstance(reply, messages.Result | messages.Failure)
            assert not (isinstance(reply, messages.Failure) and reply.code == "internal")


def test_norm_weights_are_given_away_at_open_only(services: dict[str, WorkerService]) -> None:
    for serves, kind in (("open", messages.StateResult), ("exact", messages.Failure), ("masks", messages.Failure)):
        dispatcher = Dispatcher(services[serves], "tiny", "digest")
        reply, _ = codec.decode_reply(dispatcher.answer([messages.encode(messages.State(id=1))]))
        assert isinstance(reply, kind)


def test_a_seed_is_not_shown() -> None:
    request = messages.MaskProduct(id=1, group=GROUP, seed=SEED, first=0, count=2)
    assert "seed not shown" in repr(request)
    assert repr(SEED) not in repr(request) + str(request.__rich_repr__())
