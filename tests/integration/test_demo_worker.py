"""The demonstration worker as a process: it answers like any worker, and tells what it sees at each level."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_checkpoint_with_words

from tsqp.config import EnclaveConfig
from tsqp.errors import SetupError
from tsqp.levels import open_model, runnable
from tsqp.serve.demo import demo_worker
from tsqp.serve.view import ViewSource

IDS = [17, 3, 99, 3, 58]
TEXT = "w17 w3 w99 w3 w58"
CONFIG = EnclaveConfig(mask_pool=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint_with_words(tmp_path_factory.mktemp("model"), hidden_size=96, num_hidden_layers=2)


async def _until(source: ViewSource, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    events: AsyncIterator[dict[str, Any]] = aiter(source)
    try:
        while True:
            event = await asyncio.wait_for(anext(events), 60)
            if wanted(event):
                return event
    finally:
        await events.aclose()  # type: ignore[attr-defined]


def seen(view: str, level: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Return the first event that is wanted."""
    source = ViewSource(view, level)
    try:
        return asyncio.run(_until(source, wanted))
    finally:
        source.close()


@pytest.mark.parametrize(("level", "by"), [("open", "ids"), ("verified", "nearest"), ("masked", "nearest")])
def test_it_tells_what_it_sees_and_computes_what_every_worker_does(model: Path, level: str, by: str) -> None:
    flags = ["--model", str(model), *(["--exact"] if level != "open" else [])]
    config = replace(CONFIG, mask_pool=8 if level == "masked" else None)
    ids_BT = torch.tensor([IDS])
    products = 4 if level == "open" else 9  # two layers; at `open` an embedding too, and products in chains
    with demo_worker(flags) as worker:
        assert seen(worker.view, level, lambda _event: True)["requests"] == 0
        opened = open_model(str(model), level)
        with runnable(level, opened, replace(config, worker=worker.url)) as run:
            logits_BV = run.predict(ids_BT)
        event = seen(worker.view, level, lambda event: event["requests"] >= products)
    with runnable("local", opened, EnclaveConfig()) as run:
        assert torch.allclose(logits_BV, run.predict(ids_BT), atol=1e-4)
    assert event["level"] == level
    assert event["reading"]["by"] == by
    assert (event["reading"]["prompt"] == TEXT) is (level != "masked")
    assert (event["reading"]["sure"] > 0.5) is (level != "masked")
    assert event["last"][0]["group"] == ("layers.1.o to head" if level == "open" else "head")
    if level == "masked":
        assert event["histogram"]["limit"] == 2.0**31


def test_a_worker_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="does not exist"), demo_worker(["--model", str(tmp_path / "none")]):
        pass
