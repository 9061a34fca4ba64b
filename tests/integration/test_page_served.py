"""The page in a real Chromium on the real HTTP application, its view and its padding; only the engine is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from browser import Page, chromium
from fake_engine import MODEL, FakeEngine
from fake_serve import snapshot
from http_server import http_server

DONE = "!document.querySelector('#send').disabled && document.querySelectorAll('.message').length >= 2"


class ScriptedView:
    """A view that tells the same again and again, and knows how many read it."""

    def __init__(self, level: str) -> None:
        self.event = snapshot(level)
        self.readers = 0

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._events()

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        self.readers += 1
        try:
            while True:
                yield self.event
                await asyncio.sleep(0.05)
        finally:
            self.readers -= 1


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.mark.parametrize("level", ["open", "masked"])
def test_the_page_chats_with_the_server_that_serves_it(page: Page, level: str) -> None:
    engine = FakeEngine(reply="Grüße, world")
    with http_server(engine, level=level, view=ScriptedView(level)) as server:
        page.open(server.url)
        page.until(f"document.querySelector('#model').textContent === '{MODEL}'")
        page.until(f"document.querySelector('#level').textContent === '{level}'")
        page.until("document.querySelector('#state').textContent.startsWith('Ready.')")
        page.type("#prompt", "Hello")
        page.press("Enter", 13)
        page.until(DONE)
        assert page.run("document.querySelector('.assistant .body').textContent") == "Grüße, world"
        page.until("document.querySelector('#words').textContent.length > 0")
        assert page.errors == []
        page.call("Page.navigate", url="about:blank")


def test_stop_in_the_page_cancels_in_the_engine(page: Page) -> None:
    engine = FakeEngine(hold_after=3)
    with http_server(engine) as server:
        page.open(server.url)
        page.until("document.querySelector('#verdict').textContent === 'Not offered by this server.'")
        page.type("#prompt", "Hello")
        page.press("Enter", 13)
        page.until("document.querySelector('.assistant .body')?.textContent === 'Hel'")
        page.press("Escape", 27)
        page.until(DONE)
        with engine.changed:
            assert engine.changed.wait_for(lambda: engine.cancelled, 60)
        page.call("Page.navigate", url="about:blank")


def test_a_page_that_is_left_reads_no_more(page: Page) -> None:
    view = ScriptedView("open")
    with http_server(FakeEngine(), view=view) as server:
        for _ in range(3):
            page.open(server.url)
            page.until("document.querySelector('#level').textContent === 'open'")
            page.until("document.querySelector('#words').textContent.length > 0")
            page.call("Page.navigate", url="about:blank")
        page.run("new Promise((wake) => setTimeout(wake, 1000))")
        assert view.readers == 0
