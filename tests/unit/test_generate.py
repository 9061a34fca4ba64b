"""``tsqp generate``: one prompt, and an engine with room for it alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import typer
from real_serving import speaking_checkpoint
from typer.testing import CliRunner, Result

from tsqp.cli.generate import generate
from tsqp.config import EngineConfig
from tsqp.engine import opening
from tsqp.engine.loop import GenerationEngine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking_checkpoint(tmp_path_factory.mktemp("generate") / "tiny")


def run(*words: object) -> Result:
    app = typer.Typer()
    app.command()(generate)
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, int]]:
    """The engines that were made: their settings, and how many blocks they had."""
    found: list[tuple[EngineConfig, int]] = []

    class Noted(GenerationEngine):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[arg-type]
            settings = next(each for each in arguments if isinstance(each, EngineConfig))
            found.append((settings, self.stats().blocks_total))

    monkeypatch.setattr(opening, "GenerationEngine", Noted)
    return found


@pytest.mark.parametrize(("tokens", "blocks"), [(10, 1), (61, 1), (62, 2), (200, 4)])
def test_the_cache_is_as_large_as_the_request(
    tokens: int, blocks: int, model: Path, made: list[tuple[EngineConfig, int]]
) -> None:
    """Three tokens of prompt; a block takes 64."""
    done = run("abc", "--model", model, "--level", "local", "--max-tokens", tokens)
    assert done.exit_code == 0, done.output
    assert "3 prompt tokens" in done.stderr
    assert f"({blocks * 64} tokens)." in done.stderr
    assert done.stderr.startswith("memory: keys and values ")
    ((settings, found),) = made
    assert found == blocks
    assert (settings.max_running, settings.reuse_prefixes) == (1, "off")


def test_a_chat_without_the_extra_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tsqp.serve.chat_template", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = run("abc", "--chat", "--model", model, "--level", "local")
    assert done.exit_code == 3
    assert "jinja2 is not installed: run 'pip install tsqp[serve]'" in " ".join(done.stderr.split())


@pytest.mark.parametrize("words", [[], ["--chat"]])
def test_a_prompt_that_is_not_utf8_is_one_sentence(words: list[str], model: Path) -> None:
    done = run("caf\udce9", *words, "--model", model, "--level", "local")
    assert done.exit_code == 3
    assert "the text is not UTF-8 from character" in " ".join(done.stderr.split())


def test_a_request_that_the_model_does_not_take_takes_no_memory_beyond_it(
    model: Path, made: list[tuple[EngineConfig, int]]
) -> None:
    done = run("abc", "--model", model, "--level", "local", "--max-tokens", 10**12)
    assert done.exit_code == 3
    assert "this model takes 1024 together" in " ".join(done.stderr.split())
    ((_, blocks),) = made
    assert blocks == 1024 // 64
