"""Without the checks, the attacks of this folder succeed: it is the checks that stop them."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from attacks.lies import LIES, SMALL
from attacks.test_changed_codes import EDITS, of_codes
from attacks.test_malformed import MALFORMED, sending
from attacks.traffic import Plaintext, frames_of
from hostile import (
    MASKED,
    OTHER_PROMPT,
    PROMPT,
    TARGETS,
    HostilePeer,
    Material,
    adding,
    build,
    claiming,
    honest,
    met,
    on,
)
from torch import Tensor

from tsqp.enclave import codes
from tsqp.enclave.codes import StreamedCodes, read_codes
from tsqp.enclave.freivalds import Checker, Expectation
from tsqp.enclave.mask_sources import EnclaveMasks
from tsqp.enclave.masks import Mask, MaskLedger
from tsqp.wire import codec
from tsqp.wire.codec import Claim
from tsqp.wire.messages import Result


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept every claim."""
    compare = Expectation.compare

    def accept(expectation: Expectation, claimed_MN: Tensor) -> tuple[Tensor, int]:
        return compare(expectation, claimed_MN)[0], 0

    monkeypatch.setattr(Expectation, "compare", accept)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("dealers", "target"), [(None, "layers.0.qkv"), (None, "head"), (2, "layers.1.down")], ids=str)
def test_without_the_check_a_workers_lie_changes_logits(
    material: Material, dealers: int | None, target: str, lie: str, local_logits: Tensor
) -> None:
    rig = build(material, dealers)
    rig.prefill(OTHER_PROMPT)
    rig.worker.tamper = on(target, claiming(LIES[lie]))
    logits = rig.prefill(PROMPT)
    xq_MK = dict(rig.inputs[len(material.groups) :])[target]
    integers = rig.observed_products(target, xq_MK)
    rig.worker.tamper = honest
    assert torch.equal(rig.prefill(PROMPT), local_logits)
    assert not torch.equal(integers, rig.observed_products(target, xq_MK))
    if lie not in SMALL:
        assert not torch.equal(logits, local_logits)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("liar", [0, 1])
def test_without_the_check_a_dealers_lie_changes_logits(
    material: Material, liar: int, target: str, local_logits: Tensor
) -> None:
    rig = build(material, 2)
    rig.dealers[liar].tamper = on(target, claiming(adding(1 << 30, row=3)))
    assert not torch.equal(rig.prefill(PROMPT), local_logits)


@pytest.mark.usefixtures("unchecked")
def test_without_the_check_errors_that_do_not_cancel_change_logits(material: Material, local_logits: Tensor) -> None:
    rig = build(material, 1)
    rig.worker.tamper = on("head", claiming(adding(1 << 30, row=3)))
    rig.dealers[0].tamper = on("head", claiming(adding(1 << 31, row=3)))
    assert not torch.equal(rig.prefill(PROMPT), local_logits)


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_without_addition_of_the_mask_traffic_holds_activations(
    material: Material, dealers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are right all the same: nothing but the traffic shows it."""
    monkeypatch.setattr(Mask, "add", lambda _self, xq_MK, out_MK: out_MK.copy_(xq_MK))
    monkeypatch.setattr(Mask, "products", lambda _self: ())
    plaintext = Plaintext(monkeypatch)
    rig = build(material, dealers)
    rig.prefill(PROMPT)
    assert plaintext.found_in(frames_of(rig.journal)) > 0


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_without_the_ledger_rows_repeat(
    material: Material, dealers: int, monkeypatch: pytest.MonkeyPatch, local_logits: Tensor
) -> None:
    monkeypatch.setattr(MaskLedger, "take", lambda _self, _group, _count: 0)
    rig = build(material, dealers)
    assert torch.equal(rig.prefill(PROMPT), local_logits)
    assert torch.equal(rig.prefill(PROMPT), local_logits)
    assert rig.source is not None
    assert len(set(rig.source.used)) < len(rig.source.used)
    first, second = (x_MK for group, x_MK in rig.worker.tensors if group == "layers.0.qkv")
    assert torch.equal(first, second)


def test_without_key_of_its_own_a_restart_repeats_words(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.urandom", lambda count: bytes(range(7, 7 + count)) if count <= 32 else bytes(count))
    rigs = [build(material, 0) for _ in range(2)]
    assert all(isinstance(rig.source and rig.source.source, EnclaveMasks) for rig in rigs)
    for rig in rigs:
        rig.prefill(PROMPT)
    first, second = (rig.worker.tensors for rig in rigs)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


@pytest.mark.parametrize("group", TARGETS)
def test_without_the_digest_changed_codes_are_accepted(
    material: Material, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = HostilePeer("10.6.6.6:50051", material.dispatcher())
    peer.tamper = of_codes(group, claiming(EDITS["a code off by 1"]))
    monkeypatch.setattr(codes, "hashlib", _Agreeing(material))
    checks = read_codes(material.packed.manifest, StreamedCodes(met(material, peer, "exact")), {})
    assert not torch.equal(checks.codes[group].plain(), material.codes[group])


class _Agreeing:
    """A ``hashlib`` whose every digest is what the manifest says, one group after another."""

    def __init__(self, material: Material) -> None:
        self._digests = [group.sha256 for group in material.packed.manifest.groups]

    def sha256(self) -> _Agreeing:
        return self

    def update(self, data: object) -> None:
        hashlib.sha256(data)  # type: ignore[arg-type]  # it must be bytes all the same

    def hexdigest(self) -> str:
        # Asked once or twice a group: for the comparison, and for a message that must not come.
        return self._digests.pop(0)


@pytest.mark.parametrize("form", ["labelled float32", "float32"])
def test_without_the_form_floats_are_taken_for_integers(
    material: Material, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check of shape and dtype gone, a tensor of another kind comes through to the check of values."""

    def believe(reply: Result, frames: Any, _expect: object, source: str) -> Claim:
        return Claim(codec.tensor_of(reply.y, frames[0], source), source)

    rig = build(material, None)
    monkeypatch.setattr(codec, "claim", believe)
    monkeypatch.setattr(Checker, "verified", lambda _self, claim, *_: claim.unverified())
    rig.worker.tamper = on("layers.0.qkv", sending(MALFORMED[form]))
    xq_MK = rig.material.codes["layers.0.qkv"][:2].int()
    assert rig.products.start("layers.0.qkv", xq_MK)().dtype == torch.float32
