"""lm-evaluation-harness asks the server for log-probabilities: a task made here, and an engine that needs no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_engine import LOGPROB, MODEL, FakeEngine, byte_tokenizer
from http_server import http_server

QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " a cold soup of letters"], "gold": 0},
    {"question": "Water is", "choices": [" dry as last year's bread", " wet"], "gold": 1},
    {"question": "Two and two is", "choices": [" four", " a longer answer"], "gold": 1},
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


def write_tokenizer(directory: Path) -> None:
    directory.mkdir()
    tokenizer = byte_tokenizer()._tokenizer
    (directory / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def evaluate(url: str, directory: Path) -> dict[str, object]:
    """Run the harness as its users do; return its results."""
    model = f"model={MODEL},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={directory}/tokenizer"
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


def test_its_log_likelihoods_are_those_of_the_engine(tmp_path: Path) -> None:
    write_task(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    engine = FakeEngine()
    with http_server(engine) as server:
        found = evaluate(server.url, tmp_path)
    samples = found["samples"]
    assert isinstance(samples, list)
    for question, sample in zip(QUESTIONS, samples, strict=True):
        likelihoods = [float(entry[0]) for entry in sample["filtered_resps"]]
        assert likelihoods == [LOGPROB * len(text) for text in question["choices"]]  # type: ignore[attr-defined]
    # With equal scores for all tokens the shorter choice is the likelier.
    assert found["acc"] == 2 / 3
    assert all(generation.prompt_logprobs for generation in engine.submitted)
