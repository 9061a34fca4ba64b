"""The integer levels over real workers and dealers: the same bits whoever multiplies, and close to the float model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LLAMA3_ROPE, load_llama, random_ids, tiny_checkpoint
from torch import Tensor
from workers import free_port, packed_tiny, running_worker

from tsqp.config import EnclaveConfig
from tsqp.errors import (
    ConfigError,
    InputError,
    IntegrityError,
    ModelMismatchError,
    TransportError,
    TransportTimeoutError,
    WeightsError,
)
from tsqp.levels import check_options, open_model, runnable
from tsqp.model.locate import BUNDLED, locate_packed
from tsqp.model.manifest import read_manifest
from tsqp.transport import keys

# Seeds travel in clear between processes of one test.
pytestmark = pytest.mark.filterwarnings("ignore:dealer .* has no key")

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    "head_dim-llama3": {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "num_key_value_heads": 1},
}


def logits(model: str, level: str, ids_BT: Tensor, **settings: Any) -> Tensor:
    """Return the logits at every position, run twice: filled pool or not, they must not change."""
    with runnable(level, open_model(model, level), EnclaveConfig(**settings)) as loaded:
        assert loaded.predict_all is not None
        first = loaded.predict_all(ids_BT)
        loaded.prepare(lambda _done: None)
        assert torch.equal(loaded.predict_all(ids_BT), first)
        assert torch.equal(loaded.predict(ids_BT), first[:, -1])
        if level != "local":
            assert loaded.meter.verified_rows > 0
        return first


class Peers:
    """A worker and two dealers with keys."""

    def __init__(self, packed: Path, stack: ExitStack, directory: Path) -> None:
        self.worker = stack.enter_context(running_worker(packed))
        self.dealers, self.keys = [], []
        for name in ("a", "b"):
            public, secret = keys.create(directory, name)
            self.dealers.append(stack.enter_context(running_worker(packed, "ipc", command="dealer", key=str(secret))))
            self.keys.append(str(public))

    def settings(self, dealers: int) -> dict[str, Any]:
        return {
            "worker": self.worker,
            "dealers": tuple(self.dealers[:dealers]),
            "dealer_keys": tuple(self.keys[:dealers]),
        }


# How many dealers mask, 0 for the enclave itself, and for how many tokens masks are kept ready.
SOURCES = ((0, 0), (0, 16), (1, 16), (1, 0), (2, 8))


def assert_all_agree(
    packed: Path, ids_BT: Tensor, directory: Path, sources: Sequence[tuple[int, int]] = SOURCES
) -> Tensor:
    local = logits(str(packed), "local", ids_BT)
    with ExitStack() as stack:
        peers = Peers(packed, stack, directory)
        assert torch.equal(logits(str(packed), "verified", ids_BT, worker=peers.worker), local)
        for dealers, pool in sources:
            masked = logits(str(packed), "masked", ids_BT, mask_pool=pool, **peers.settings(dealers))
            assert torch.equal(masked, local), f"{dealers} dealers, pool of {pool}"
        cut = logits(str(packed), "local", ids_BT, micro_batches=3)
        assert torch.equal(logits(str(packed), "verified", ids_BT, worker=peers.worker, micro_batches=3), cut)
        overlapped = logits(str(packed), "masked", ids_BT, mask_pool=8, micro_batches=3, **peers.settings(1))
        assert torch.equal(overlapped, cut)
        torch.testing.assert_close(cut, local, rtol=1e-2, atol=1e-2)
    return local


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_tiny_models_give_the_same_bits_at_every_level(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = tiny_checkpoint(tmp_path / "model", **options)
    packed = packed_tiny(directory, tmp_path / "packed")
    ids_BT = random_ids(2, 11)
    local = assert_all_agree(packed, ids_BT, tmp_path)
    exact = load_llama(directory).prefill(ids_BT, all_logits=True)
    errors = (local - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float(errors.median()) < 0.05, "int8 weights move logits by more than a few percent"
    assert not torch.equal(local, exact)


def test_the_bundled_model_gives_the_same_bits_at_every_level(bundled_directory: Path, tmp_path: Path) -> None:
    assert bundled_directory.is_dir()
    packed = locate_packed(BUNDLED)
    ids_BT = torch.arange(100, 124)[None]
    local = assert_all_agree(packed, ids_BT, tmp_path, ((0, 16), (2, 8)))
    floats = load_llama(bundled_directory).prefill(ids_BT, all_logits=True)
    agreement = float((local.argmax(-1) == floats.argmax(-1)).float().mean())
    assert agreement > 0.9


@pytest.fixture
def packed(tiny_llama: Path, tmp_path: Path) -> Path:
    return packed_tiny(tiny_llama, tmp_path / "packed")


@pytest.fixture
def url(packed: Path) -> Iterator[str]:
    with running_worker(packed) as url:
        yield url


def test_codes_come_from_a_directory_or_from_the_worker(packed: Path, url: str) -> None:
    ids_BT = random_ids(1, 5)
    streamed = logits(str(packed), "masked", ids_BT, worker=url)
    assert torch.equal(logits(str(packed), "masked", ids_BT, worker=url, codes=str(packed)), streamed)
    assert torch.equal(logits(str(packed / "enclave"), "verified", ids_BT, worker=url), streamed)


@pytest.mark.parametrize("options", [{"seed": 9}, {"hidden_size": 96}, {"num_key_value_heads": 6}], ids=str)
def test_codes_of_another_model_are_refused(packed: Path, url: str, tmp_path: Path, options: dict[str, Any]) -> None:
    other = packed_tiny(tiny_checkpoint(tmp_path / "other", **options), tmp_path / "other-packed")
    with pytest.raises(IntegrityError, match=r"the codes of layers\.0\.qkv from .* are not the model's"):
        logits(str(packed), "verified", random_ids(1, 5), worker=url, codes=str(other))


def test_peers_with_another_model_are_refused(packed: Path, url: str, tmp_path: Path) -> None:
    other = packed_tiny(tiny_checkpoint(tmp_path / "other", seed=9), tmp_path / "other-packed")
    mismatch = r"the {} at .* holds model .* this side expects digest"
    with running_worker(other) as wrong, pytest.raises(ModelMismatchError, match=mismatch.format("worker")):
        logits(str(packed), "masked", random_ids(1, 3), worker=wrong)
    with (
        running_worker(other, "ipc", command="dealer") as wrong,
        pytest.raises(ModelMismatchError, match=mismatch.format("dealer")),
    ):
        logits(str(packed), "masked", random_ids(1, 3), worker=url, dealers=(wrong,))


def test_a_dealer_that_does_not_answer_is_an_error(packed: Path, url: str) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with pytest.raises(TransportTimeoutError, match=f"no TSQP dealer answered at {nobody}"):
        logits(str(packed), "masked", random_ids(1, 3), worker=url, dealers=(nobody,), connect_timeout_s=0.3)


def test_a_dealer_that_dies_ends_the_run_and_nothing_weaker_takes_its_place(packed: Path, url: str) -> None:
    with ExitStack() as stack:
        dying = ExitStack()
        dealer = dying.enter_context(running_worker(packed, "ipc", command="dealer"))
        config = EnclaveConfig(worker=url, dealers=(dealer,), mask_pool=0, request_timeout_s=2.0)
        loaded = stack.enter_context(runnable("masked", open_model(str(packed), "masked"), config))
        loaded.predict(random_ids(1, 3))
        sent = loaded.meter.bytes_sent
        dying.close()
        with pytest.raises(TransportError):
            loaded.predict(random_ids(1, 40))
        assert loaded.meter.bytes_sent == sent


def test_the_worker_needs_its_own_part_only_and_the_enclave_its_own(packed: Path) -> None:
    with running_worker(packed / "worker") as url:
        moved = packed.parent / "enclave-alone"
        (packed / "enclave").rename(moved)
        assert logits(str(moved), "masked", random_ids(1, 3), worker=url).isfinite().all()
        with pytest.raises(WeightsError, match="worker/"):
            logits(str(moved), "local", random_ids(1, 3))


def test_a_plain_model_is_packed_into_the_cache_once(tiny_llama: Path, cache: Path) -> None:
    first = open_model(str(tiny_llama), "masked")
    assert first.directory.is_relative_to(cache)
    assert open_model(str(tiny_llama), "verified").directory == first.directory
    assert open_model(str(tiny_llama), "local").packed is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "dealers"}, "needs at least one --dealer"),
        ({"masks": "enclave", "dealers": ("a.example:1",)}, "exclude each other"),
        ({"mask_pool": 1 << 20, "mask_memory": 1 << 20}, "Lower --mask-pool or raise --mask-memory"),
    ],
)
def test_masks_that_cannot_be_are_refused(packed: Path, url: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        logits(str(packed), "masked", random_ids(1, 3), worker=url, **settings)


@pytest.mark.parametrize("level", ["open", "local", "verified", "monolithic"])
@pytest.mark.parametrize(
    "settings",
    [{"masks": "enclave"}, {"dealers": ("127.0.0.1:1",)}, {"dealer_keys": ("k",)}, {"mask_pool": 5}],
    ids=str,
)
def test_asking_for_masks_at_another_level_is_refused(level: str, settings: dict[str, Any]) -> None:
    """A weaker level must not be what one gets for forgetting --level."""
    with pytest.raises(ConfigError, match=f"is for the level masked, this run is at {level}"):
        check_options(level, EnclaveConfig(**settings), offload_attention=False)


def test_other_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(ConfigError, match="--codes is for the levels verified, masked and local"):
        check_options("open", EnclaveConfig(codes="x"), offload_attention=False)
    with pytest.raises(ConfigError, match="--offload-attention is for the level open"):
        check_options("masked", EnclaveConfig(), offload_attention=True)


@pytest.mark.parametrize("level", ["local", "verified", "masked"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(tmp_path: Path, level: str, value: float) -> None:
    directory = tiny_checkpoint(tmp_path / "model")
    packed = packed_tiny(directory, tmp_path / "packed")
    model = open_model(str(packed), level)
    assert model.packed is not None
    model.packed.state["model.layers.1.input_layernorm.weight"][3] = value
    refusal = pytest.raises(InputError, match="infinite or not a number")
    with running_worker(packed) as url, runnable(level, model, EnclaveConfig(worker=url)) as loaded, refusal:
        loaded.predict(random_ids(1, 3))


def test_manifest_and_worker_agree_on_the_codes(packed: Path) -> None:
    assert read_manifest(packed).codes_digest == read_manifest(packed / "enclave").codes_digest
