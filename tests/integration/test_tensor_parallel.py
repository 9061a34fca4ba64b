"""A worker of several processes: the same bits as of one, and what becomes of it when one of them is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny_models import assert_same_logits, load_llama, random_ids, tiny_checkpoint
from torch import Tensor
from workers import free_port, linked, packed_tiny

from tsqp.config import EnclaveConfig
from tsqp.errors import RankLostError, TransportError
from tsqp.levels import open_model, runnable
from tsqp.model.architecture import read_config
from tsqp.model.llama import Llama

OPTIONS: dict[str, Any] = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
# For a machine that has other work.
PATIENCE_S = 60


class Ranks:
    """A worker that runs, with the other processes that it has."""

    def __init__(self, process: subprocess.Popen[str], log: Path, ready: dict[str, Any]) -> None:
        self.process = process
        self.ready = ready
        self.url: str = ready["endpoints"][0]
        self.others = psutil.Process(process.pid).children(recursive=True)
        self._log = log

    def ends(self) -> int:
        """Wait until all processes have ended; return the first one's exit code."""
        code = self.process.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(self.others, PATIENCE_S)
        assert alive == []
        return code

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def kill(self) -> None:
        for process in (*self.others, psutil.Process(self.process.pid)):
            process.kill()
        self.process.wait()


@contextmanager
def started(
    directory: Path, words: list[str], *options: str, environment: dict[str, str] | None = None
) -> Iterator[Ranks]:
    """Start ``tsqp worker`` by a command line, and leave nothing of it."""
    log = directory / "stderr"
    listen = ["--listen", f"ipc://{os.environ['XDG_RUNTIME_DIR']}/ranks-{free_port()}"]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *words, *listen, "--device", "cpu", "--json", *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    ranks = None
    try:
        line = process.stdout.readline() if process.stdout else ""
        assert line, log.read_text(encoding="utf-8")
        ranks = Ranks(process, log, json.loads(line))
        yield ranks
    finally:
        if ranks and process.poll() is None:
            ranks.kill()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


WORKER = ["tsqp", "worker"]


def logits(model: Path | str, level: str, ids_BT: Tensor, **settings: Any) -> Tensor:
    with runnable(level, open_model(str(model), level), EnclaveConfig(**settings)) as loaded:
        assert loaded.predict_all is not None
        return loaded.predict_all(ids_BT)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ranks") / "model", **OPTIONS)


@pytest.fixture(scope="module")
def tiny_codes(tiny: Path) -> Path:
    return packed_tiny(tiny, tiny.parent / "packed")


def test_two_ranks_give_the_bits_of_one_and_end_when_told(tiny_codes: Path, tmp_path: Path) -> None:
    """Codes come from the ranks that hold them, too."""
    ids_BT = random_ids(2, 11)
    local = logits(tiny_codes, "local", ids_BT)
    with started(tmp_path, WORKER, "--model", str(tiny_codes), "--tensor-parallel", "2") as ranks:
        assert ranks.ready["tensor_parallel"] == 2
        assert len(ranks.others) == 1
        assert torch.equal(logits(tiny_codes, "verified", ids_BT, worker=ranks.url), local)
        assert torch.equal(logits(tiny_codes, "masked", ids_BT, worker=ranks.url), local)
        ranks.process.terminate()
        assert ranks.ends() == 0
        assert ranks.said == ""


def test_four_ranks_give_the_bits_of_one_on_the_bundled_model_and_end_when_one_is_silent(
    bundled_packed: Path, tmp_path: Path
) -> None:
    ids_BT = torch.arange(100, 105)[None]
    with started(tmp_path, WORKER, "--model", str(bundled_packed), "--tensor-parallel", "4") as ranks:
        masked = logits(bundled_packed, "masked", ids_BT, worker=ranks.url, codes=str(bundled_packed))
        ranks.others[1].suspend()
        assert ranks.ends() == RankLostError.exit_code
    assert torch.equal(masked, logits(bundled_packed, "local", ids_BT))
    assert "of 4 is lost: it said nothing for 10 s. The worker cannot go on without it: start it again." in ranks.said


def test_three_ranks_serve_floats_and_end_when_one_is_killed(tiny: Path, tmp_path: Path) -> None:
    """No number of rows is a multiple of three but two; the client learns that the link is lost, not of a bug."""
    ids_BT, runtime = random_ids(2, 11), Path(os.environ["XDG_RUNTIME_DIR"])
    before = sorted(runtime.glob("tsqp-*"))
    with (
        started(tmp_path, WORKER, "--model", str(tiny), "--tensor-parallel", "3") as ranks,
        linked(ranks.url, tiny) as link,
    ):
        model = Llama(read_config(tiny), link.ops, offload_attention=True)
        split_BTV = model.prefill(ids_BT, all_logits=True)
        ranks.others[0].kill()
        with pytest.raises(TransportError):
            model.prefill(ids_BT)
        assert ranks.ends() == RankLostError.exit_code
    assert sorted(runtime.glob("tsqp-*")) == before, "a private directory is left"
    local_BTV = load_llama(tiny).prefill(ids_BT, all_logits=True)
    assert_same_logits(split_BTV, local_BTV, tolerance=16 * torch.finfo(torch.float32).eps)
    assert "of 3 is lost: it was killed by SIGKILL. The worker cannot go on without it" in ranks.said


def test_ranks_of_several_machines_meet_over_the_network_and_none_stays_without_the_first(
    tiny_codes: Path, tmp_path: Path
) -> None:
    """Here both machines are this one, and each process is told that it is alone on its own."""
    ids_BT = random_ids(1, 5)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    alone = {**os.environ, **meeting, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    options = ["--model", str(tiny_codes), "--device", "cpu", "--insecure"]
    with subprocess.Popen(
        [sys.executable, "-m", *WORKER, *options], env={**alone, "RANK": "1"}, stderr=subprocess.PIPE, text=True
    ) as second:
        try:
            with started(tmp_path, WORKER, *options, environment={**alone, "RANK": "0"}) as ranks:
                assert ranks.others == []
                masked = logits(tiny_codes, "masked", ids_BT, worker=ranks.url)
                ranks.process.kill()
                assert second.wait(PATIENCE_S) == RankLostError.exit_code
        finally:
            second.kill()
        assert second.stderr
        assert second.stderr.read().endswith("error: rank 1: rank 0 is gone, so this one ends.\n")
    assert torch.equal(masked, logits(tiny_codes, "local", ids_BT))


def test_ranks_of_torchrun_work_together(tiny_codes: Path, tmp_path: Path) -> None:
    """All of them get SIGTERM at once; rank 0 answers first what it has taken in, and says stop."""
    ids_BT = random_ids(1, 5)
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m"]
    with started(tmp_path, [*torchrun, *WORKER], "--model", str(tiny_codes)) as ranks:
        assert ranks.ready["tensor_parallel"] == 2
        assert torch.equal(
            logits(tiny_codes, "verified", ids_BT, worker=ranks.url), logits(tiny_codes, "local", ids_BT)
        )
        ranks.process.terminate()
        ranks.ends()
        assert "rank" not in ranks.said.replace("torchrun", "")
