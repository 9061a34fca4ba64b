"""Loading needs little more memory than the weights it ends with, in the dtype it ends with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import large_checkpoint_of

from tsqp.model.architecture import linear_groups, read_config

# 302 MB in float32; the largest single tensor, the embedding, is a ninth of it.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": True,
}
ALLOWED = 1.3

# VmHWM is the peak of this program alone; ru_maxrss would start at the peak of the process that started it.
SCRIPT = """
import sys
from pathlib import Path
import torch
from tsqp.model.architecture import read_config
from tsqp.model.linears import Linears
from tsqp.model.weights import Checkpoint

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

directory, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
torch.ones(8, 8).to(torch.bfloat16).float() @ torch.ones(8, 8)
config, checkpoint = read_config(directory), Checkpoint(directory)
before = peak()
linears = Linears(config, checkpoint, dtype, torch.device("cpu"))
sys.stdout.write(str(peak() - before))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_checkpoint_of(CONFIG, tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(("dtype", "element_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_peak_is_little_above_the_weights(large_checkpoint: Path, dtype: str, element_bytes: int) -> None:
    """A peak also includes the file pages of the tensor being copied: at worst all of the largest, in float32."""
    config = read_config(large_checkpoint)
    elements = config.vocab_size * config.hidden_size
    elements += sum(group.rows * group.in_features for group in linear_groups(config) if group.name != "head")
    assert elements * 4 > 280e6
    command = [sys.executable, "-c", SCRIPT, str(large_checkpoint), dtype]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    weights_bytes = elements * element_bytes
    assert weights_bytes * 0.9 < int(run.stdout) < weights_bytes * ALLOWED
