"""Copies what an enclave reads of a model: of a Hugging Face directory, or the enclave's part of a packed model."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tsqp.model.locate import locate, locate_packed
from tsqp.model.manifest import enclave_directory
from tsqp.model.weights import INDEX_NAME, Checkpoint

READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def files_of(kind: str, model: str) -> list[Path]:
    """List the files of a model that a program reads.

    Args:
        kind: ``plain``, or ``packed`` for `masked` and `verified`.
        model: as ``tsqp`` takes it.
    """
    if kind == "packed":
        return sorted(path for path in enclave_directory(locate_packed(model)).iterdir() if path.is_file())
    directory = locate(model)
    named = [directory / name for name in (*READ, INDEX_NAME)]
    return sorted([path for path in named if path.is_file()] + Checkpoint(directory).files)


def copy(kind: str, model: str, out: Path) -> None:
    """Copy them; the directory appears when it is complete."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in files_of(kind, model):
        shutil.copyfile(file, part / file.name)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("plain", "packed"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    copy(asked.kind, asked.model, asked.out)
    print(f"{asked.out}: {len(list(asked.out.iterdir()))} files")
