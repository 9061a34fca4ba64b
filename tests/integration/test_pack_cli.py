"""``tsqp pack``: its JSON, its sentences, and that nothing is overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from tiny_models import tiny_checkpoint
from typer.testing import CliRunner

from tsqp.cli import app
from tsqp.model.packed import open_codes, open_enclave
from tsqp.reports import ErrorReport, PackReport, schema


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command in this process; return exit code, standard output and standard error."""
    result = CliRunner().invoke(app, ["pack", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def test_json_has_the_promised_fields(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=2)
    (model / "LICENSE").write_text("terms", encoding="utf-8")
    code, out, err = run("--model", model, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    assert set(json.loads(out)) == set(schema()["$defs"]["PackReport"]["required"])
    got = msgspec.json.decode(out, type=PackReport)
    enclave, codes = open_enclave(tmp_path / "out"), open_codes(tmp_path / "out")
    assert (got.model, got.out, got.groups, got.licence_files) == ("model", str(tmp_path / "out"), 9, ["LICENSE"])
    assert (got.manifest_digest, got.source_digest) == (enclave.manifest.digest, enclave.manifest.source_digest)
    assert got.codes_digest == codes.codes_digest
    assert got.worker_bytes == sum(path.stat().st_size for path in (tmp_path / "out" / "worker").iterdir())
    assert got.enclave_bytes == sum(path.stat().st_size for path in (tmp_path / "out" / "enclave").iterdir())


def test_the_summary_says_where_the_licence_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
    monkeypatch.setenv("LLAMA_MODEL_PATH", str(model))
    code, out, _ = run("--out", tmp_path / "one")
    assert (code, out.count("no licence file was found")) == (0, 1)
    (model / "NOTICE").write_text("terms", encoding="utf-8")
    code, out, _ = run("--out", tmp_path / "two")
    assert (code, out.count("licence   copied: NOTICE")) == (0, 1)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "file").write_bytes(b"")
    cases = [
        (["--model", model, "--out", model], "exists already; remove it or choose another --out."),
        (["--model", tmp_path / "nowhere", "--out", tmp_path / "out"], "does not exist"),
        (["--model", model, "--out", tmp_path / "file" / "out"], "cannot write the packed model to"),
    ]
    assert run("--model", model, "--out", tmp_path / "packed")[0] == 0
    cases.append((["--model", tmp_path / "packed", "--out", tmp_path / "out"], "it holds int8 codes only"))
    before = sorted(os.listdir(tmp_path))  # noqa: PTH208  names only
    for arguments, message in cases:
        code, out, err = run(*arguments, "--json")
        assert code == 3
        assert message in msgspec.json.decode(out, type=ErrorReport).error.message
        assert message in err
    assert sorted(os.listdir(tmp_path)) == before  # noqa: PTH208
