"""Packing and reading packed models need memory for a layer, not for the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import large_checkpoint_of

# 352 MB of codes, four times that as float32; the embedding is 67 MB, the largest layer 47 MB.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
}
EMBEDDING_BYTES = 16384 * 1024 * 4
# Four blocks of 16 MiB while one is quantised, and what the allocator keeps; DESIGN allows a gigabyte.
WORKING_BYTES = 200e6

# VmHWM is the peak of this program alone; ru_maxrss would start at the peak of the process that started it.
SCRIPT = """
import sys
from pathlib import Path
import torch
from tsqp.model.pack import pack
from tsqp.model.packed import open_codes, open_enclave

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

what, directory, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
torch.ones(8, 8).to(torch.bfloat16).float() @ torch.ones(8, 8)
before = peak()
if what == "pack":
    pack(directory, "large", out)
elif what == "codes":
    codes = open_codes(out)
    for group in codes.groups:
        codes.read(group.name)
else:
    enclave = open_enclave(out)
sys.stdout.write(str(peak() - before))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_checkpoint_of(CONFIG, tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_peaks_do_not_grow_with_the_model(large_checkpoint: Path, tmp_path: Path) -> None:
    """Packing works in blocks of rows; the enclave holds the embedding table, the codes are read a group at a time."""
    model_bytes = sum(path.stat().st_size for path in large_checkpoint.glob("*.safetensors"))
    assert model_bytes > 400e6
    largest_codes = EMBEDDING_BYTES // 4
    allowed = {
        "pack": WORKING_BYTES,
        "codes": largest_codes + 10e6,
        "enclave": EMBEDDING_BYTES + 30e6,
    }
    for what, limit in allowed.items():
        command = [sys.executable, "-c", SCRIPT, what, str(large_checkpoint), str(tmp_path / "out")]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert run.returncode == 0, run.stderr
        assert 0 < int(run.stdout) < limit, f"{what}: {int(run.stdout) / 1e6:.0f} MB, allowed {limit / 1e6:.0f}"
