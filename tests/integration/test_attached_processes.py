"""Attached models over real workers and dealers: those of a linear map elsewhere, and those that attach starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner
from workers import running_worker

import tsqp
from benchmarks.any_decoder import build, logits, prompt
from tsqp.cli import app
from tsqp.decoder.loading import load_decoder
from tsqp.errors import ModelMismatchError, UnsupportedModelError, WeightsError
from tsqp.transport import keys


def run(*arguments: object) -> tuple[int, str, str]:
    """Run ``tsqp export`` in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("qwen3")
    build("Qwen3").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
    """What ``tsqp export`` wrote and said."""
    out = checkpoint / "map"
    code, said, error = run("--model", checkpoint, "--out", out, "--json")
    assert code == 0, error
    return out, json.loads(said)


def test_export_says_what_it_wrote(exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, report = exported
    manifest = tsqp.export(build("Qwen3"), tmp_path / "map")
    assert report["manifest_digest"] != manifest.digest, "the name is in the manifest"
    assert (report["source_digest"], report["codes_digest"]) == (manifest.source_digest, manifest.codes_digest)
    assert (report["groups"], len(report["moved"]), report["dtype"]) == (9, 15, "float32")
    assert list(report["stayed"]) == ["model.embed_tokens"]
    assert report["worker_bytes"] == (out / "worker/codes.safetensors").stat().st_size
    assert report["floats_bytes"] == (out / "floats/weights.safetensors").stat().st_size


def test_a_worker_of_exported_floats_serves_an_attached_model(
    exported: tuple[Path, dict[str, Any]], checkpoint: Path
) -> None:
    model = load_decoder(checkpoint)
    plain = logits(model)
    with running_worker(exported[0] / "floats") as url:
        with tsqp.attach(model, url, "open") as attached:
            torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
            assert attached.meter.round_trips >= len(attached.groups)
        with pytest.raises(ModelMismatchError, match="serves float weights"):
            tsqp.attach(model, url, "verified")
        with tsqp.attach(model, url, "open", wire_dtype="int8"):
            assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)


def test_a_worker_and_a_dealer_of_exported_codes_serve_one_at_masked(
    exported: tuple[Path, dict[str, Any]], checkpoint: Path, tmp_path: Path
) -> None:
    model = load_decoder(checkpoint)
    out = exported[0]
    with tsqp.attach(model, level="local", directory=out):
        expected = logits(model)
    public, secret = keys.create(tmp_path, "dealer")
    with (
        running_worker(out / "worker") as worker,
        running_worker(out / "worker", "ipc", command="dealer", key=str(secret)) as dealer,
    ):
        for pool in (0, 16):
            settings: dict[str, Any] = {"dealers": (dealer,), "dealer_keys": (str(public),), "mask_pool": pool}
            with tsqp.attach(model, worker, "masked", directory=out, **settings) as attached:
                assert torch.equal(logits(model), expected)
                assert torch.equal(logits(model), expected), "with masks that were made meanwhile"
                assert attached.meter.mask_rows > 0
                assert attached.meter.verified_rows > 0


def test_attach_starts_a_worker_of_its_own() -> None:
    model = build("Mistral")
    with tsqp.attach(model, level="local"):
        expected = logits(model)
    with tsqp.attach(model, level="masked"), torch.no_grad():
        assert torch.equal(logits(model), expected)
        model.generate(prompt(), attention_mask=torch.ones_like(prompt()), max_new_tokens=3, pad_token_id=0)


def test_the_bundled_model_says_the_same_at_open(bundled_directory: Path) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415  slow to import

    model, tokenizer = load_decoder(bundled_directory), AutoTokenizer.from_pretrained(bundled_directory)
    ids = tokenizer("The capital of France is", return_tensors="pt")

    def text() -> str:
        return str(tokenizer.decode(model.generate(**ids, max_new_tokens=12, do_sample=False)[0]))

    plain = text()
    assert "Paris" in plain
    with tsqp.attach(model) as attached:
        assert text() == plain
        assert attached.level == "open"
        # The embedding table stays, and norms.
        assert 3 * sum(value.nbytes for value in model.parameters() if not value.is_meta) < attached.freed_bytes
    assert text() == plain


def test_what_is_no_decoder_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(WeightsError, match="transformers cannot read"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}', encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="as a decoder"):
        load_decoder(tmp_path)
    code, _, error = run("--model", tmp_path, "--out", tmp_path / "out")
    assert (code, "transformers cannot load" in error) == (3, True)
    code, _, error = run("--model", tmp_path, "--out", tmp_path / "out", "--dtype", "int4")
    assert (code, "unknown dtype 'int4'" in error) == (3, True)


def test_export_tells_people_what_moved_and_stayed(checkpoint: Path, tmp_path: Path) -> None:
    code, said, _ = run("--model", checkpoint, "--out", tmp_path / "map", "--dtype", "bfloat16")
    assert code == 0
    assert "moved     15 modules in 9 groups" in said
    assert "stayed    model.embed_tokens: an embedding table" in said
    assert "MB in bfloat16, digest" in said
    code, _, error = run("--model", checkpoint, "--out", tmp_path / "map")
    assert (code, "exists already; remove it or choose another --out." in error) == (3, True)
