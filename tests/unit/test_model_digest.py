"""Which model an enclave must have: named by a digest, and refused if it is another, at every level."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_models import edit_manifest
from tiny_models import tiny_checkpoint

from tsqp.config import EnclaveConfig
from tsqp.errors import ModelMismatchError
from tsqp.levels import digest_of, open_model, runnable
from tsqp.model.pack import pack


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    pack(plain, "tiny", tmp_path / "packed")
    return tmp_path / "packed"


def test_the_right_one_runs(plain: Path, packed: Path) -> None:
    for model in (open_model(str(plain), "local"), open_model(str(packed), "local")):
        digest = digest_of(model)
        assert len(digest) == 64
        for given in (digest, digest.upper()):
            with runnable("local", model, EnclaveConfig(model_digest=given)) as run:
                assert torch.isfinite(run.predict(torch.tensor([[1, 2, 3]]))).all()


@pytest.mark.parametrize("level", ["open", "local", "verified", "masked", "monolithic"])
def test_another_is_refused_before_anybody_is_asked(level: str, plain: Path, packed: Path) -> None:
    directory = packed if level in ("verified", "masked") else plain
    config = EnclaveConfig(model_digest="ab" * 32, worker="tcp://127.0.0.1:1")
    refused = pytest.raises(ModelMismatchError, match=r"has the digest [0-9a-f]{64}, not abab.*TSQP_MODEL_DIGEST")
    with refused, runnable(level, open_model(str(directory), level), config):
        pass


def test_a_manifest_that_was_changed_is_of_another_model(packed: Path) -> None:
    """Who can replace a packed model's files replaces their digests in its manifest too."""
    before = digest_of(open_model(str(packed), "local"))
    edit_manifest(packed, lambda raw: raw.update(source_digest="cd" * 32))
    refused = pytest.raises(ModelMismatchError, match=before)
    with refused, runnable("local", open_model(str(packed), "local"), EnclaveConfig(model_digest=before)):
        pass
