"""Tiny models of many architectures, attached at every level: the plain model's logits, and the same bits checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from attached import answer_with, peer_of

import tsqp
from benchmarks.any_decoder import HEADING, MARKS, MODELS, PAGE, Row, build, logits, prompt, row

# Rounding: a product of K terms errs by at most K 2^-24 of |x| |w|. In two layers of five products with K up to 100
# that is 2 x 5 x 100 x 6e-8 = 6e-5 of the largest logit, if no error ever cancels another.
TOLERANCE = 1e-4


@contextmanager
def served(level: str, directory: Path) -> Iterator[dict[str, Any]]:
    """Yield what ``attach`` is given to find a linear map, and a worker of this process where one is needed."""
    with pytest.MonkeyPatch.context() as patch:
        if level == "local":
            yield {"directory": directory}
        else:
            yield {"directory": directory, "worker": answer_with(peer_of(directory, level), patch)}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_what_the_table_says(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "map"
    tsqp.export(build(name), directory)
    found = row(name, lambda level: served(level, directory))
    assert found.open_error <= TOLERANCE
    assert found.same, "verified, masked and local must give the same bits"
    assert 0 < found.exact_error < 0.2, "int8 weights move logits by some percent"
    rows = [line for line in page_table().splitlines() if line.startswith(f"| {name} |")]
    assert [without_numbers(line) for line in rows] == [without_numbers(str(found))], (
        "run python benchmarks/any_decoder.py --write"
    )
    assert float(rows[0].split("|")[4]) <= TOLERANCE


def test_the_table_has_these_rows_and_no_others() -> None:
    lines = page_table().splitlines()
    assert "\n".join(lines[:2]) + "\n" == HEADING
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(MODELS)


def page_table() -> str:
    return PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]


def without_numbers(line: str) -> str:
    """Leave out how much logits differ: that depends on the processor."""
    return re.sub(r"\d+e[-+]\d+", "#", line)


def test_numbers_alone_are_left_out() -> None:
    line = str(Row("a", "3 modules in 2 groups", "none", 1e-7, 2e-2, same=False))
    assert without_numbers(line) == "| a | 3 modules in 2 groups | none | # | NO | # |"


@torch.no_grad()
def generated(model: Any, **options: Any) -> torch.Tensor:
    mask = torch.ones_like(prompt())
    found: torch.Tensor = model.generate(
        prompt(), attention_mask=mask, max_new_tokens=8, pad_token_id=0, eos_token_id=None, **options
    )
    return found


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-NeoX", "Mixtral"])
def test_generation_goes_on_as_before(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, by beams and with a sampler: caches and processors are transformers' own."""
    model, directory = build(name), tmp_path / "map"
    plain = [generated(model, do_sample=False), generated(model, do_sample=False, num_beams=2)]
    torch.manual_seed(3)
    plain.append(generated(model, do_sample=True, top_k=20))
    tsqp.export(model, directory)
    with tsqp.attach(model, answer_with(peer_of(directory, "open"), monkeypatch), "open", directory=directory):
        assert torch.equal(generated(model, do_sample=False), plain[0])
        assert torch.equal(generated(model, do_sample=False, num_beams=2), plain[1])
        torch.manual_seed(3)
        assert torch.equal(generated(model, do_sample=True, top_k=20), plain[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_its_own(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = build("Qwen2").to(dtype), tmp_path / "map"
    plain = logits(model)
    tsqp.export(model, directory)
    with tsqp.attach(model, answer_with(peer_of(directory, "open", dtype), monkeypatch), "open", directory=directory):
        ours = logits(model)
    assert ours.dtype == dtype
    # Each of some ten roundings to the dtype moves a logit by eps of the largest; that errors add up is allowed for.
    assert float((ours - plain).abs().max() / plain.abs().max()) < 32 * torch.finfo(dtype).eps
    with tsqp.attach(model, level="local", directory=directory):
        assert logits(model).dtype == dtype
