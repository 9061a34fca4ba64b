"""Every committed input of the fuzzer, of the corpora and of found crashes, gives a value or the right error."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import targets


@pytest.mark.parametrize("name", targets.MODULES)
def test_every_kept_input_is_answered_as_it_must_be(name: str) -> None:
    inputs = targets.kept_inputs(name)
    assert inputs
    for path in inputs:
        replay(name, path)


def replay(name: str, path: Path) -> None:
    try:
        targets.load(name).run(path.read_bytes())
    except BaseException as error:
        raise AssertionError(f"{path.relative_to(targets.HERE)} crashes the target {name}.") from error


@pytest.mark.parametrize("name", targets.MODULES)
def test_a_corpus_has_an_input_for_every_seed(name: str) -> None:
    """Whoever adds a seed writes the corpus anew: python -m fuzz.make_corpus."""
    kept = {path.name for path in (targets.CORPUS / name).iterdir()}
    assert targets.load(name).seeds().keys() <= kept
