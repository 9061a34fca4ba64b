"""The page in a real Chromium, against a stand-in for the server: what people see, hear and can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from browser import PATIENCE_S, Page, chromium
from fake_serve import QUESTION, Fake, serving

ANSWER = "The capital of France is Paris."
DONE = "!document.querySelector('#send').disabled && document.querySelectorAll('.message').length >= 2"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A page without errors, before and after."""
    browser.look_like(1280, 900)
    browser.errors.clear()
    yield browser
    browser.call("Page.navigate", url="about:blank")
    assert browser.errors == []


def opened(page: Page, fake: Fake) -> Page:
    page.open(fake.url)
    page.until("document.querySelector('#model').textContent === 'smollm2'")
    return page


def ask(page: Page, text: str = QUESTION) -> None:
    page.type("#prompt", text)
    page.press("Enter", 13)


def answer_of(page: Page) -> str:
    return str(page.run("[...document.querySelectorAll('.message.assistant .body')].at(-1).textContent"))


def test_a_question_is_answered_and_the_next_one_carries_the_conversation(page: Page) -> None:
    with serving(Fake()) as fake:
        opened(page, fake)
        page.run("document.querySelector('#temperature').value = 0.7; document.querySelector('#max-tokens').value = 9")
        ask(page)
        page.until(DONE)
        assert answer_of(page) == ANSWER
        ask(page, "And of Spain?")
        page.until(f"document.querySelectorAll('.message').length === 4 && {DONE}")
    first, second = fake.asked
    assert first == {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0.7,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [each["role"] for each in second["messages"]] == ["user", "assistant", "user"]
    assert second["messages"][1]["content"] == ANSWER


def test_the_answer_appears_piece_by_piece_beside_what_the_worker_reads(page: Page) -> None:
    with serving(Fake(gate=threading.Semaphore(0))) as fake:
        assert fake.gate is not None
        opened(page, fake)
        assert page.run("document.querySelector('#verdict').textContent").startswith(("Nothing yet", "Connecting"))
        ask(page)
        for shown in ("The", "The capital", "The capital of"):
            fake.gate.release()
            page.until(f"[...document.querySelectorAll('.assistant .body')].at(-1)?.textContent === '{shown}'")
            page.until(f"document.querySelector('#read-answer').textContent === '{shown}'")
        assert page.run("document.querySelector('#log').getAttribute('aria-busy')") == "true"
        page.until("document.querySelector('#running').textContent === '1'")
        assert QUESTION in page.text("#read-prompt")
        fake.gate.release(10)
        page.until(DONE)
        assert page.text("#announce") == ANSWER


@pytest.mark.parametrize(
    ("level", "kind", "says", "reads"),
    [("open", "bad", "reads every word", True), ("verified", "bad", "reads every word", True),
     ("masked", "good", "uniform noise", False)],
)  # fmt: skip
def test_the_view_says_what_the_level_gives_away(page: Page, level: str, kind: str, says: str, reads: bool) -> None:  # noqa: FBT001
    with serving(Fake(level=level)) as fake:
        opened(page, fake)
        ask(page)
        page.until(DONE)
        page.until(f"document.querySelector('#verdict').className.includes('{kind}')")
        assert says in page.text("#verdict")
        assert (QUESTION in page.text("#text")) is reads
        assert page.text("#level") == level
        heights = page.run(
            "[...document.querySelectorAll('#histogram rect')].map((bar) => +bar.attributes.height.value)"
        )
        assert len(heights) == 64
        assert (min(heights) > 0.8 * max(heights)) is (level == "masked")
        page.run("document.querySelector('#requests-box').open = true; 1")
        page.until("document.querySelectorAll('#requests tr').length === 5")


def test_the_view_never_claims_noise_where_words_are_read(page: Page) -> None:
    with serving(Fake(level="open")) as fake:
        opened(page, fake)
        verdicts = page.run(
            """(async () => {
              const { view } = await import('./view.js');
              const event = (level, sure) => ({ level, run: 1, serves: 'exact', requests: 1, size_bytes: 1, words: [],
                histogram: null, last: [], reading: { by: 'nearest', prompt: 'p', answer: '', sure } });
              return ['masked', 'verified'].map((level) => {
                view.show(event(level, level === 'masked' ? 0.9 : 0.1));
                const verdict = document.querySelector('#verdict');
                return verdict.className + ': ' + verdict.textContent;
              });
            })()"""
        )
    assert verdicts[0].startswith("verdict bad: It reads words although the level is masked")
    assert verdicts[1].startswith("verdict bad: It gets activations in clear")


def test_a_server_without_a_view_says_so_and_chats_all_the_same(page: Page) -> None:
    with serving(Fake(level=None)) as fake:
        opened(page, fake)
        page.until("document.querySelector('#verdict').textContent === 'Not offered by this server.'")
        assert "tsqp demo" in page.text("#worker")
        ask(page)
        page.until(DONE)
        assert answer_of(page) == ANSWER
        assert "/view" not in fake.paths


def test_a_question_that_is_sent_before_the_model_is_known_waits_for_it(page: Page) -> None:
    with serving(Fake()) as fake:
        fake.names_model.clear()
        page.open(fake.url)
        page.until("document.querySelector('#state').textContent === 'Ready.'")
        ask(page)
        page.until("document.querySelector('#send').disabled")
        assert fake.asked == []
        fake.names_model.set()
        page.until(DONE)
        assert answer_of(page) == ANSWER
        assert fake.asked[0]["model"] == "smollm2"


def test_times_by_part_do_not_overlap(page: Page) -> None:
    with serving(Fake(level="masked")) as fake:
        opened(page, fake)
        ask(page)
        page.until(DONE)
        page.until("document.querySelector('#parts-list').textContent.includes('rest of the enclave')")
        shown = page.run("[...document.querySelectorAll('#parts-list li')].map((each) => each.textContent)")
        widths = page.run("[...document.querySelectorAll('#parts rect')].map((bar) => +bar.attributes.width.value)")
        filled = page.text("#filling")
    names = [text.rsplit(" ", 2)[0] for text in shown]
    assert names == ["worker", "on the way", "attention", "quantising", "masking", "checking",
                     "rest of the enclave", "sampling"]  # fmt: skip
    enclave = sum(widths[2:7])
    assert sum(widths) == pytest.approx(1000, abs=0.1)
    assert enclave == pytest.approx(1000 * 0.4 / (0.8 + 0.1 + 0.4 + 0.03), abs=0.1)
    assert "of filling the mask pool" in filled


def test_a_phone_keeps_its_keyboard_down_after_an_answer(page: Page) -> None:
    page.look_like(390, 844)
    page.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        with serving(Fake()) as fake:
            opened(page, fake)
            ask(page)
            page.until(DONE)
            assert page.run("document.activeElement.id") == "log"
    finally:
        page.call("Emulation.setTouchEmulationEnabled", enabled=False)


def test_the_end_of_an_answer_takes_the_focus_from_nothing_else(page: Page) -> None:
    with serving(Fake(gate=threading.Semaphore(0))) as fake:
        assert fake.gate is not None
        opened(page, fake)
        ask(page)
        page.until("document.querySelector('#words').textContent.length > 0")
        page.run("document.querySelector('#text').focus()")
        fake.gate.release(10)
        page.until(DONE)
        assert page.run("document.activeElement.id") == "text"


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_ends_the_request(page: Page, way: str) -> None:
    with serving(Fake(gate=threading.Semaphore(1))) as fake:
        opened(page, fake)
        ask(page)
        page.until("[...document.querySelectorAll('.assistant .body')].at(-1)?.textContent === 'The'")
        if way == "button":
            page.run("document.querySelector('#stop').click()")
        else:
            page.press("Escape", 27)
        page.until(DONE)
        assert fake.hung_up.wait(PATIENCE_S)
        assert page.text(".assistant .end") == "stopped"
        assert page.run("document.activeElement.id") == "prompt"


def test_the_key_is_sent_and_kept_nowhere(page: Page) -> None:
    with serving(Fake(key="sk-secret")) as fake:
        page.open(fake.url)
        page.until("document.querySelector('#state').textContent.includes('Settings')")
        page.type("#key", "sk-secret")
        page.press("Tab", 9)
        page.until("document.querySelector('#model').textContent === 'smollm2'")
        ask(page)
        page.until(DONE)
        assert answer_of(page) == ANSWER
        kept = page.run("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
        assert "sk-secret" not in kept
        page.open(fake.url)
        assert page.run("document.querySelector('#key').value") == ""
    page.errors[:] = [error for error in page.errors if "401" not in error]


def test_an_error_in_the_stream_is_shown_and_the_answer_so_far_stays(page: Page) -> None:
    with serving(Fake(failure="the worker's link was lost.")) as fake:
        opened(page, fake)
        ask(page)
        page.until("!document.querySelector('#error').hidden")
        assert page.text("#error") == "the worker's link was lost."
        assert answer_of(page) == ANSWER
        assert page.text(".assistant .end") == "ended by an error"


def test_a_refused_question_can_be_sent_again(page: Page) -> None:
    with serving(Fake(refusal=(429, "too many requests wait."))) as fake:
        opened(page, fake)
        ask(page)
        page.until("!document.querySelector('#error').hidden")
        assert page.text("#error") == "too many requests wait."
        assert page.run("document.querySelector('#prompt').value") == QUESTION
        fake.refusal = None
        page.press("Enter", 13)
        page.until(DONE)
        assert page.run("document.querySelector('#error').hidden")
        assert fake.asked[0]["messages"] == [{"role": "user", "content": QUESTION}]
    page.errors[:] = [error for error in page.errors if "429" not in error]


def test_markup_in_answers_is_text(page: Page) -> None:
    nasty = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    with serving(Fake(pieces=(nasty,))) as fake:
        opened(page, fake)
        ask(page, nasty)
        page.until(DONE)
        page.until(f"document.querySelector('#read-answer').textContent === {nasty!r}")
        assert answer_of(page) == nasty
        assert page.run("document.querySelectorAll('#log img, #log script, #text img').length") == 0
        assert "owned" not in page.run("document.title")


@pytest.mark.parametrize("level", ["open", "masked"])
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_is_wider_than_the_window(page: Page, width: int, level: str) -> None:
    pieces = ("x" * 500, " Donaudampfschifffahrtsgesellschaftskapitän " * 3)
    page.look_like(width, 740)
    with serving(Fake(level=level, pieces=pieces)) as fake:
        opened(page, fake)
        ask(page)
        page.until(DONE)
        page.run("for (const box of document.querySelectorAll('details')) box.open = true")
        page.until("document.querySelectorAll('#requests tr').length === 5")
        assert page.run("document.documentElement.scrollWidth") == width
        small = page.run(
            "[...document.querySelectorAll('button, input, textarea, summary')]"
            ".filter((each) => each.getBoundingClientRect().height < 24).map((each) => each.id || each.textContent)"
        )
        assert small == []


def test_the_theme_follows_the_system_and_the_button(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with serving(Fake()) as fake:
        opened(page, fake)
        light = page.run(ground)
        page.look_like(1280, 900, dark=True)
        dark = page.run(ground)
        assert (light, dark) == ("rgb(245, 244, 239)", "rgb(20, 22, 26)")
        page.run("document.querySelector('#theme').click()")
        assert (page.text("#theme"), page.run(ground)) == ("Theme: light", light)
        page.open(fake.url)
        assert page.run(ground) == light
        page.run("document.querySelector('#theme').click(); document.querySelector('#theme').click()")
        assert (page.text("#theme"), page.run(ground)) == ("Theme: auto", dark)


def test_little_motion_means_one_picture_a_second(page: Page) -> None:
    page.look_like(1280, 900, calm=True)
    with serving(Fake()) as fake:
        opened(page, fake)
        ask(page)
        page.until(DONE)
        page.until("document.querySelector('#words').textContent.length > 0")
        drawn = page.run(
            """(async () => {
              const { view } = await import('./view.js');
              let drawn = 0;
              const show = view.show;
              view.show = function (event) { drawn += 1; return show.call(view, event); };
              for (let turn = 0; turn < 50; turn += 1) view.take({ ...view.last });
              return drawn;
            })()"""
        )
        assert drawn <= 1


def test_the_keyboard_reaches_everything_in_order(page: Page) -> None:
    with serving(Fake()) as fake:
        opened(page, fake)
        page.run("document.querySelector('#settings').open = true; document.activeElement.blur()")
        reached = []
        for _ in range(12):
            page.press("Tab", 9)
            reached.append(page.run("document.activeElement.id || document.activeElement.className"))
        assert reached[0] == "skip"
        wanted = ["theme", "clear", "log", "prompt", "send", "temperature", "max-tokens", "key"]
        assert [name for name in reached if name in wanted] == wanted


def test_the_accessibility_tree_names_what_it_shows(page: Page) -> None:
    with serving(Fake()) as fake:
        opened(page, fake)
        ask(page)
        page.until(DONE)
        page.until("document.querySelector('#words').textContent.length > 0")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {
        (str(node["role"]["value"]), str(node.get("name", {}).get("value", "")))
        for node in nodes
        if not node.get("ignored")
    }
    expected = {("region", "Chat"), ("region", "What the worker sees"), ("region", "The engine"),
                ("textbox", "Message"), ("button", "Send"), ("button", "Stop"), ("log", "Conversation")}  # fmt: skip
    assert expected <= named
    roles = {role for role, _ in named}
    assert {"main", "banner", "contentinfo", "heading"} <= roles
    need = ("button", "textbox", "spinbutton", "image", "link")
    unnamed = [role for role, name in named if role in need and not name]
    assert unnamed == []
