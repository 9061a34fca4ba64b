"""A host that records all traffic: at `masked` it holds no activation, no scale and no token; at `verified` it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attacks.traffic import Plaintext, frames_of, headers_of, holds_ids
from hostile import MASKED, OTHER_PROMPT, PROMPT, Material, Rig, build
from torch import Tensor

from tsqp.enclave import masks
from tsqp.enclave.codes import Checks, DirectoryCodes, read_codes
from tsqp.wire import codec, messages
from tsqp.worker import services

# Twelve tokens of the bundled model's vocabulary; three in a row are unlikely in any other bytes.
BUNDLED_PROMPT = torch.tensor([[504, 5575, 16438, 282, 4649, 314, 41876, 30, 7042, 9906, 28, 13021]])


@pytest.fixture
def plaintext(monkeypatch: pytest.MonkeyPatch) -> Plaintext:
    return Plaintext(monkeypatch)


@pytest.fixture
def large_plaintext(monkeypatch: pytest.MonkeyPatch) -> Plaintext:
    """Of the bundled model, whose activations are many: the tiny one's are looked for in float16 too."""
    return Plaintext(monkeypatch, (torch.float32,))


@pytest.fixture(scope="module")
def bundled(bundled_packed: Path) -> Material:
    return Material.read(bundled_packed)


@pytest.fixture(scope="module")
def bundled_checks(bundled: Material) -> Checks:
    return read_codes(bundled.packed.manifest, DirectoryCodes(bundled.directory), {})


def assert_nothing_leaks(rig: Rig, plaintext: Plaintext, ids: list[int]) -> None:
    frames = frames_of(rig.journal)
    assert plaintext.integers
    assert plaintext.found_in(frames) == 0
    assert plaintext.scales_found_in(frames) == 0
    assert not any(holds_ids(frame, ids) for frame in frames)
    assert_headers_are_plain(rig)


def assert_headers_are_plain(rig: Rig) -> None:
    """Fail if a header carries more than numbers of rows, names and, to a dealer, its seed; lists are shapes only."""
    fields = {
        "linear_exact": {"op", "id", "v", "group", "x"},
        "mask_product": {"op", "id", "v", "group", "seed", "first", "count"},
        "hello": {"op", "id", "v", "software"},
        "codes": {"op", "id", "v", "group", "first", "rows"},
    }
    for header in headers_of(rig.journal):
        assert set(header) == fields[header["op"]]
        x = header.get("x", {"dtype": "int32", "shape": [0, 0]})
        assert set(x) == {"dtype", "shape"}
        assert len(x["shape"]) == 2
        scalars = [value for name, value in header.items() if name != "x"]
        assert all(isinstance(value, (int, str, bytes)) for value in scalars)


def sent_rows(rig: Rig) -> list[bytes]:
    return [bytes(codec.frame_of(row)) for _, x_MK in rig.worker.tensors for row in x_MK]


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
@pytest.mark.parametrize("pool_rows", [0, 8], ids=["just in time", "from the pool"])
def test_masked_traffic_holds_nothing(material: Material, plaintext: Plaintext, dealers: int, pool_rows: int) -> None:
    rig = build(material, dealers, pool_rows=pool_rows)
    for ids in (PROMPT, PROMPT, OTHER_PROMPT):
        rig.prefill(ids)
    assert_nothing_leaks(rig, plaintext, PROMPT[0].tolist())


@pytest.mark.parametrize("dealers", [0, 2], ids=["enclave masks", "two dealers"])
def test_masked_traffic_of_the_bundled_model_holds_nothing(
    bundled: Material, bundled_checks: Checks, large_plaintext: Plaintext, dealers: int
) -> None:
    rig = build(bundled, dealers, checks=bundled_checks)
    rig.prefill(BUNDLED_PROMPT, all_logits=False)
    assert_nothing_leaks(rig, large_plaintext, BUNDLED_PROMPT[0].tolist())


def test_verified_traffic_of_the_bundled_model_holds_activations(
    bundled: Material, bundled_checks: Checks, large_plaintext: Plaintext
) -> None:
    """The control: the same search finds all of them where they travel in clear. Ids do not leave at any level."""
    rig = build(bundled, None, checks=bundled_checks)
    rig.prefill(BUNDLED_PROMPT, all_logits=False)
    rows = [row for xq_MK in large_plaintext.integers for row in xq_MK]
    assert large_plaintext.found_in(frames_of(rig.journal)) >= sum(len(row) - 7 for row in rows)
    assert not any(holds_ids(frame, BUNDLED_PROMPT[0].tolist()) for frame in frames_of(rig.journal))


def test_verified_traffic_holds_activations(material: Material, plaintext: Plaintext) -> None:
    rig = build(material, None)
    rig.prefill()
    rows = {bytes(codec.frame_of(row)) for xq_MK in plaintext.integers for row in xq_MK}
    assert plaintext.found_in(frames_of(rig.journal)) > 0
    assert rows == set(sent_rows(rig))


@pytest.mark.parametrize("form", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", range(4))
def test_the_search_finds_floats_anywhere(
    material: Material, plaintext: Plaintext, form: torch.dtype, shift: int
) -> None:
    """A row of floats inside a frame, at any offset; and a scale; and ids."""
    build(material, None).prefill()
    hidden = plaintext.floats[3][2].to(form)
    frame = b"\7" * (64 + shift) + bytes(codec.frame_of(hidden.view(torch.int8))) + b"\7" * 9
    assert plaintext.found_in([frame]) > 0
    assert plaintext.found_in([b"\7" * 512]) == 0
    assert plaintext.scales_found_in([b"\1" + plaintext.scales[2][1].numpy().tobytes()]) == 1
    for ids in (PROMPT, PROMPT.int(), PROMPT.short()):
        assert holds_ids(b"\1" + ids.numpy().tobytes(), PROMPT[0].tolist())


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_without_its_keystream_a_mask_hides_nothing(
    material: Material, plaintext: Plaintext, dealers: int, monkeypatch: pytest.MonkeyPatch, local_logits: Tensor
) -> None:
    """The control of `masked`: it is the keystream that hides. Logits are right all the same."""

    def zeros(_key: bytes, _group: int, _first: int, count: int, inputs: int) -> Tensor:
        return torch.zeros(count, inputs, dtype=torch.int32)

    monkeypatch.setattr(masks, "keystream_rows", zeros)
    monkeypatch.setattr(services, "keystream_rows", zeros)
    rig = build(material, dealers)
    assert torch.equal(rig.prefill(), local_logits)
    rows = {bytes(codec.frame_of(row)) for xq_MK in plaintext.integers for row in xq_MK}
    assert plaintext.found_in(frames_of(rig.journal)) > 0
    assert rows == set(sent_rows(rig))


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_the_same_prompt_twice_gives_other_words(material: Material, dealers: int) -> None:
    """No row repeats, and words agree no more often than chance has it (here: about once in 40,000 prefills)."""
    rig = build(material, dealers)
    rig.prefill()
    first = rig.worker.tensors
    rig.prefill()
    second = rig.worker.tensors[len(first) :]
    assert [(group, x_MK.shape) for group, x_MK in first] == [(group, x_MK.shape) for group, x_MK in second]
    rows = [row for row in sent_rows(rig) if row]
    assert len(set(rows)) == len(rows)
    assert sum(int((a == b).sum()) for (_, a), (_, b) in zip(first, second, strict=True)) <= 2


def test_the_same_prompt_twice_at_verified_gives_the_same_words(material: Material) -> None:
    """The control of the test above."""
    rig = build(material, None)
    rig.prefill()
    first = sent_rows(rig)
    rig.prefill()
    assert sent_rows(rig) == first * 2


@pytest.mark.parametrize("dealers", MASKED.values(), ids=MASKED)
def test_masked_words_look_uniform(material: Material, dealers: int) -> None:
    """Every bit of the words sent is set half of the time: within six standard deviations."""
    rig = build(material, dealers)
    for _ in range(4):
        rig.prefill()
    words = torch.cat([x_MK.flatten() for _, x_MK in rig.worker.tensors])
    allowed = 6 * 0.5 / len(words) ** 0.5
    for bit in range(32):
        assert abs(float(((words >> bit) & 1).double().mean()) - 0.5) < allowed


@pytest.mark.parametrize("dealers", [1, 2])
def test_dealers_are_sent_seeds_and_numbers_only(material: Material, dealers: int) -> None:
    rig = build(material, dealers)
    rig.prefill()
    orders = [sent.header for dealer in rig.dealers for sent in dealer.received[1:]]
    assert all(isinstance(order, messages.MaskProduct) for order in orders)
    assert not any(dealer.tensors for dealer in rig.dealers)
    seeds = [{getattr(sent.header, "seed", None) for sent in dealer.received[1:]} for dealer in rig.dealers]
    assert all(len(each) == 1 for each in seeds)
    assert len(set.union(*seeds)) == dealers


@pytest.mark.parametrize("dealers", [1, 2])
def test_a_seed_is_sent_to_its_own_dealer_only(material: Material, dealers: int) -> None:
    rig = build(material, dealers)
    rig.prefill()
    for dealer in rig.dealers:
        seed = next(sent.header.seed for sent in dealer.received if isinstance(sent.header, messages.MaskProduct))
        others = [sent for sent in rig.journal if sent.peer != dealer.address]
        assert others
        assert not any(seed in frame for frame in frames_of(others))
