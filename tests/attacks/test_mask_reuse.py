"""Links that fail, threads, forks and empty pools: no mask row ever hides two inputs."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hostile import (
    MASKED,
    OTHER_PROMPT,
    PROMPT,
    TARGETS,
    Exchange,
    Material,
    Message,
    Rig,
    Tamper,
    adding,
    build,
    claiming,
    fill,
    honest,
    on,
)
from torch import Tensor

from tsqp.enclave.mask_pool import MaskPool
from tsqp.enclave.masks import Mask
from tsqp.errors import (
    IntegrityError,
    MaskReuseError,
    TransportClosedError,
    TransportError,
    TransportTimeoutError,
)
from tsqp.wire import codec, messages
from tsqp.wire.messages import AnyRequest

FAULTS = (TransportClosedError, TransportTimeoutError)


@pytest.fixture(params=MASKED)
def masked(request: pytest.FixtureRequest, material: Material) -> Rig:
    """`masked` with each source of masks, a small pool and one retry."""
    return build(material, MASKED[request.param], pool_rows=3, retries=1)


def losing(times: int, fault: type[TransportError] | None) -> Tamper:
    """Lose the first replies: with an error of the link, or (None) in silence."""
    left = [times]

    def tampered(exchange: Exchange) -> list[Message | TransportError]:
        if left[0] == 0:
            return [exchange.reply]
        left[0] -= 1
        return [fault("the link failed.")] if fault else []

    return tampered


def products_sent(rig: Rig) -> list[tuple[str, bytes]]:
    """List the products that the worker was asked for: group and words."""
    return [
        (sent.group, sent.frames[1]) for sent in rig.worker.received if isinstance(sent.header, messages.LinearExact)
    ]


def masks_of(rig: Rig) -> list[bytes]:
    """Recover the mask row under every row sent, from what each product was asked for; retries taken once."""
    assert len(distinct(products_sent(rig))) == len(rig.inputs)
    rows = []
    for (group, words), (asked, xq_MK) in zip(distinct(products_sent(rig)), rig.inputs, strict=True):
        assert group == asked
        xm_MK = torch.frombuffer(bytearray(words), dtype=torch.int32).view_as(xq_MK)
        rows += [bytes(codec.frame_of(row)) for row in xm_MK - xq_MK]
    return rows


def distinct(products: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    return list(dict.fromkeys(products))


def assert_no_reuse(*rigs: Rig) -> None:
    """Fail if a row number was used twice, or if a recovered mask row is under two different inputs."""
    source = rigs[0].source
    assert source is not None
    assert max(Counter(source.used).values()) == 1
    rows = Counter(row for rig in rigs for row in masks_of(rig))
    assert max(rows.values()) == 1
    assert rows.total() == len(source.used)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("fault", [*FAULTS, None], ids=["closed", "timed out", "silent"])
def test_a_retry_resends_the_same_bytes(
    masked: Rig, target: str, fault: type[TransportError] | None, local_logits: Tensor
) -> None:
    masked.worker.tamper = on(target, losing(1, fault))
    assert torch.equal(masked.prefill(PROMPT), local_logits)
    attempts = [words for group, words in products_sent(masked) if group == target]
    assert len(attempts) == 2
    assert attempts[0] == attempts[1]
    assert masked.worker.links == 2
    assert_no_reuse(masked)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_that_never_left_is_sent_as_it_was(
    masked: Rig, fault: type[TransportError], local_logits: Tensor
) -> None:
    """The link fails before the request leaves: what is sent afterwards is hidden by the row already taken."""
    taken: list[int] = []

    def fail(request: AnyRequest) -> None:
        if isinstance(request, messages.LinearExact) and request.group == "layers.1.down" and not taken:
            assert masked.source is not None
            taken.append(len(masked.source.used))
            raise fault("the link failed.")

    masked.worker.before = fail
    assert torch.equal(masked.prefill(PROMPT), local_logits)
    assert [group for group, _ in products_sent(masked)].count("layers.1.down") == 1
    assert_no_reuse(masked)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_prefill_begun_again_takes_fresh_rows(masked: Rig, fault: type[TransportError], local_logits: Tensor) -> None:
    """Retries run out, the prompt is computed anew: the same activations, other words, all the way."""
    masked.worker.tamper = on("layers.1.down", losing(2, fault))
    with pytest.raises(fault):
        masked.prefill(PROMPT)
    assert torch.equal(masked.prefill(PROMPT), local_logits)
    attempts = [words for group, words in products_sent(masked) if group == "layers.1.down"]
    assert attempts[0] == attempts[1] != attempts[2]
    assert_no_reuse(masked)


def test_a_link_that_fails_at_every_product_reuses_nothing(masked: Rig, local_logits: Tensor) -> None:
    failed: set[bytes] = set()

    def fail_once_each(exchange: Exchange) -> list[Message | TransportError]:
        words = bytes(codec.frame_of(exchange.tensors[0])) if exchange.tensors else b""
        if not words or words in failed:
            return [exchange.reply]
        failed.add(words)
        return [TransportClosedError("the link failed.")]

    masked.worker.tamper = fail_once_each
    assert torch.equal(masked.prefill(PROMPT), local_logits)
    products = products_sent(masked)
    assert products[0::2] == products[1::2]
    assert_no_reuse(masked)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dealers", [1, 2])
def test_rows_of_a_dealer_whose_link_fails_are_burnt(
    material: Material, dealers: int, fault: type[TransportError]
) -> None:
    """Its products never came; the rows that were ordered are not ordered again."""
    rig = build(material, dealers)
    rig.dealers[-1].tamper = on("layers.1.down", losing(1, fault))
    with pytest.raises(fault):
        rig.prefill(PROMPT)
    rig.dealers[-1].tamper = honest
    rig.prefill(PROMPT)
    for dealer in rig.dealers:
        orders = [sent.header for sent in dealer.received if isinstance(sent.header, messages.MaskProduct)]
        rows = Counter((order.group, order.first + row) for order in orders for row in range(order.count))
        assert max(rows.values()) == 1
    assert_no_reuse_of_rows(rig)


def assert_no_reuse_of_rows(rig: Rig) -> None:
    assert rig.source is not None
    assert max(Counter(rig.source.used).values()) == 1


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("pool_rows", [1, 40])
def test_threads_that_share_a_pool_share_no_row(
    material: Material, dealers: int, pool_rows: int, local_logits: Tensor
) -> None:
    """Four enclave threads with workers of their own, and one that fills the pool, all at once."""
    first = build(material, dealers, pool_rows=pool_rows, retries=1)
    rigs = [first, *(first.second_enclave() for _ in range(3))]
    start = threading.Barrier(len(rigs) + 1)

    def run(rig: Rig) -> bool:
        start.wait()
        rig.worker.tamper = on("layers.1.down", losing(1, TransportClosedError))
        return all(torch.equal(rig.prefill(PROMPT), local_logits) for _ in range(3))

    def refill() -> bool:
        assert first.pool is not None
        start.wait()
        for _ in range(20):
            first.pool.fill_step()
        return True

    with ThreadPoolExecutor(len(rigs) + 1) as threads:
        running = [*(threads.submit(run, rig) for rig in rigs), threads.submit(refill)]
        assert all(future.result() for future in running)
    assert_no_reuse(*rigs)


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("pool_rows", [0, 1])
def test_an_empty_pool_computes_fresh_rows(
    material: Material, dealers: int, pool_rows: int, local_logits: Tensor
) -> None:
    """Slower, never unmasked and never used again."""
    rig = build(material, dealers, pool_rows=pool_rows)
    for _ in range(3):
        assert torch.equal(rig.prefill(PROMPT), local_logits)
    assert_no_reuse(rig)


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_rows_of_discarded_products_stay_burnt(material: Material, dealers: int) -> None:
    """After a lie the pool is thrown away; another pool over the same ledger starts where it ended."""
    rig = build(material, dealers, pool_rows=8)
    assert rig.source is not None
    assert rig.pool is not None
    ledger = rig.pool._ledger
    rig.worker.tamper = on("layers.1.down", claiming(adding(1)))
    with pytest.raises(IntegrityError):
        rig.prefill(PROMPT)
    again = MaskPool(material.groups, rig.source, ledger, 0, 1 << 30, rig.meter)
    for group in material.groups:
        again.take(group.name, 4).add(torch.zeros(4, group.in_features, dtype=torch.int32))
    assert_no_reuse_of_rows(rig)
    rows_per_group = Counter(group for group, _ in rig.source.used)
    assert rows_per_group["layers.0.qkv"] == PROMPT.shape[1] + 4
    assert ("layers.0.qkv", 8) in rig.source.used


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_a_mask_hides_one_input(material: Material, dealers: int) -> None:
    rig = build(material, dealers, pool_rows=4)
    assert rig.pool is not None
    mask = rig.pool.take("layers.0.qkv", 2)
    mask.add(torch.zeros(2, 48, dtype=torch.int32))
    with pytest.raises(MaskReuseError, match="a second input"):
        mask.add(torch.ones(2, 48, dtype=torch.int32))


def test_threads_that_race_for_one_mask_use_it_once(material: Material) -> None:
    rig = build(material, 0, pool_rows=4)
    assert rig.pool is not None
    for _ in range(20):
        mask = rig.pool.take("layers.0.qkv", 2)
        start = threading.Barrier(4)

        def add(mask: Mask = mask, start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                mask.add(torch.zeros(2, 48, dtype=torch.int32))
            except MaskReuseError:
                return False
            return True

        with ThreadPoolExecutor(4) as threads:
            assert sum(future.result() for future in [threads.submit(add) for _ in range(4)]) == 1


def _report(action: str, rig: Rig, mask: Mask, writer: int) -> None:
    """In a fork: try, and tell the parent how it went."""
    assert rig.pool is not None
    torch.set_num_threads(1)
    try:
        if action == "take":
            rig.pool.take("layers.0.qkv", 1)
        elif action == "fill":
            rig.pool.fill_step()
        elif action == "product":
            rig.products.start("layers.0.qkv", torch.ones(1, 48, dtype=torch.int32))()
        else:
            mask.add(torch.ones(2, 48, dtype=torch.int32))
    except MaskReuseError as error:
        os.write(writer, str(error).encode())
    else:
        os.write(writer, b"done")
    finally:
        os.close(writer)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("action", ["take", "fill", "product", "add"])
def test_a_fork_hides_nothing_with_its_parents_masks(material: Material, dealers: int, action: str) -> None:
    """Neither from the pool nor with a mask that the parent has taken: both would use the same row."""
    rig = build(material, dealers, pool_rows=4)
    assert rig.pool is not None
    mask = rig.pool.take("layers.0.qkv", 2)
    reader, writer = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_report, args=(action, rig, mask, writer))
    child.start()
    os.close(writer)
    child.join()
    with os.fdopen(reader, "rb") as pipe:
        assert b"fork" in pipe.read()
    mask.add(torch.zeros(2, 48, dtype=torch.int32))


def test_two_enclaves_share_no_mask(material: Material) -> None:
    """A restart draws another key: row 0 of one is not row 0 of the other."""
    rigs = [build(material, 0) for _ in range(2)]
    for rig in rigs:
        rig.prefill(PROMPT)
    rows = Counter(row for rig in rigs for row in masks_of(rig))
    assert max(rows.values()) == 1


@pytest.mark.parametrize("dealers", [None, 0, 2], ids=["verified", "enclave-masks", "two-dealers"])
def test_a_late_reply_to_a_lost_request_is_not_taken_for_another(
    material: Material, dealers: int | None, local_logits: Tensor
) -> None:
    """A worker answers a request that timed out on the link opened after it, with that request's number."""
    rig = build(material, dealers, retries=1)
    lost: list[Message] = []

    def late(exchange: Exchange) -> list[Message]:
        if exchange.group == "layers.0.qkv" and not lost:
            lost.append(exchange.reply)
            return []
        if exchange.group == "layers.0.o" and len(lost) == 1:
            lost.append(exchange.reply)
            return [lost[0], exchange.reply]
        return [exchange.reply]

    rig.worker.tamper = late
    with pytest.raises(Exception, match=rig.worker.address):
        rig.prefill(PROMPT)
    assert [group for group, _ in rig.outputs] == ["layers.0.qkv"]
    fresh = build(material, dealers)
    assert torch.equal(fresh.prefill(PROMPT), local_logits)
    assert not torch.equal(fresh.prefill(OTHER_PROMPT), local_logits)


def test_a_filled_pool_is_used_before_rows_are_made(material: Material) -> None:
    """The control of the pool tests: rows come from the pool, in order."""
    rig = build(material, 0, pool_rows=8)
    assert rig.pool is not None
    assert rig.source is not None
    fill(rig.pool)
    before = len(rig.source.products)
    rig.pool.take("layers.0.qkv", 8)
    assert len(rig.source.products) == before
    rig.pool.take("layers.0.qkv", 1)
    assert len(rig.source.products) == before + 1
