"""lm-evaluation-harness asks a server over the bundled model for log-probabilities; transformers' are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from real_serving import MODEL, real_server
from soak.answers import float32_error
from tiny_models import reference_from

from tsqp.model.architecture import linear_groups, read_config
from tsqp.model.tokenizer import read_tokenizer

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a cold soup of letters"], "gold": 0},
    {"question": "Water is", "choices": [" dry as last year's bread", " wet"], "gold": 1},
    {"question": "Two and two is", "choices": [" four", " a longer answer"], "gold": 0},
    {
        "question": "Question: What is the capital of France?\nAnswer:",
        "choices": [" Paris", " Rome", " Oslo"],
        "gold": 0,
    },
    {"question": "Ein Löffel ist zum Essen da, und ein Bett", "choices": [" zum Schlafen", " zum Fliegen"], "gold": 0},
]
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write_task(directory: Path) -> None:
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS), encoding="utf-8")
    (directory / "own.yaml").write_text(TASK.format(data=data), encoding="utf-8")


def evaluate(url: str, tokenizer: Path, directory: Path) -> dict[str, Any]:
    """Run the harness as its users do; return its results."""
    model = f"model={MODEL},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer}"
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    words += ["--model_args", f"{model},num_concurrent=2,max_retries=1", "--tasks", "own", "--include_path", "."]
    words += ["--batch_size", "2", "--output_path", "out", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "hf")}
    environment = {**os.environ, **offline, "OPENAI_API_KEY": "none"}
    done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    [results] = (directory / "out").rglob("results_*.json")
    found: dict[str, object] = json.loads(results.read_text(encoding="utf-8"))["results"]["own"]
    [samples] = (directory / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return {"acc": found["acc,none"], "samples": sorted(lines, key=lambda line: line["doc_id"])}


class Reference:
    """Log-likelihoods by transformers, and by how much another float32 computation may differ."""

    def __init__(self, directory: Path) -> None:
        self._model = reference_from(directory)
        self._tokenizer = read_tokenizer(directory)
        architecture = read_config(directory)
        inputs = max(group.in_features for group in linear_groups(architecture))
        self._error = float32_error(architecture.layers, inputs)

    @torch.inference_mode()
    def likelihood(self, question: str, choice: str) -> tuple[float, bool, float]:
        """Return how likely a choice is after a question, whether it is the likeliest, and the sum's tolerance.

        A log-probability is off by at most twice what its logit is.
        """
        asked, whole = self._tokenizer.encode(question), self._tokenizer.encode(question + choice)
        count = len(whole) - len(asked)
        assert whole[: len(asked)] == asked
        logits_TV = self._model(torch.tensor([whole])).logits[0, len(asked) - 1 : -1].float()
        ids = torch.tensor(whole[len(asked) :])
        logprobs = logits_TV.log_softmax(-1)[range(count), ids]
        likeliest = bool((logits_TV.argmax(-1) == ids).all())
        return float(logprobs.sum()), likeliest, count * 2 * self._error * float(logits_TV.abs().max())


def test_its_log_likelihoods_are_those_of_transformers(tmp_path: Path, bundled_directory: Path) -> None:
    write_task(tmp_path)
    with real_server(bundled_directory, "open") as server:
        found = evaluate(server.url, bundled_directory, tmp_path)
    reference = Reference(bundled_directory)
    right = 0
    for question, sample in zip(QUESTIONS, found["samples"], strict=True):
        best = []
        for choice, response in zip(question["choices"], sample["filtered_resps"], strict=True):  # type: ignore[call-overload]
            expected, likeliest, tolerance = reference.likelihood(str(question["question"]), choice)
            assert tolerance < 0.05, "too much to tell anything"
            assert float(response[0]) == pytest.approx(expected, rel=0, abs=tolerance)
            assert str(response[1]) == str(likeliest)
            best.append(expected)
        right += best.index(max(best)) == question["gold"]
    assert found["acc"] == right / len(QUESTIONS)
    assert right >= 3
