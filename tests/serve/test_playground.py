"""The playground in headless Chromium: streams, colours, four rows, the keyboard, the dark."""

import re
import time

import pytest

from tests.report import chromium
from tests.serve import tiny

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.executable() is None, reason="needs Debian's chromium"),
]

READY = "document.body.dataset.ready === 'yes'"
BUSY = "panes.filter((pane) => pane.controller).length"


class Address:
    """What `Browser.open` asks of a path."""

    def __init__(self, url: str):
        self.url = url

    def as_uri(self) -> str:
        return self.url


@pytest.fixture(scope="module")
def browser():
    started = chromium.Browser()
    yield started
    started.close()


@pytest.fixture
def page(browser, served):
    """The page, loaded and connected."""

    def load(**options):
        browser.open(Address(f"{served.url}/"), **options)
        until(browser, READY)

    load()
    browser.load = load
    yield browser
    do(browser, "stopAll()")
    served.wait_idle()


@pytest.fixture
def slow(served, monkeypatch):
    """Steps of at least 40 ms, so that there is something to watch and to stop."""
    step = served.engine.step

    def call():
        time.sleep(0.04)
        return step()

    monkeypatch.setattr(served.engine, "step", call)


def do(browser, statement: str) -> None:
    browser.evaluate(f"(() => {{ {statement}; return null; }})()")


def until(browser, expression: str, seconds: float = 60) -> None:
    tiny.eventually(lambda: browser.evaluate(f"Boolean({expression})"), seconds)


def key(browser, name: str, code: int, **more) -> None:
    for kind in ("rawKeyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code, **more
        )


def write(browser, row: int, text: str) -> None:
    do(browser, f"panes[{row}].box.focus()")
    browser.call("Input.insertText", text=text)


def reply(browser, row: int = 0) -> str:
    return browser.evaluate(
        f"[...panes[{row}].log.querySelectorAll('.said.assistant')].at(-1).textContent"
    )


def aside(browser) -> str:
    return browser.evaluate("[...document.querySelectorAll('.said.aside')].at(-1)?.textContent")


def colour(browser, css: str) -> tuple[int, int, int]:
    found = browser.evaluate(f"getComputedStyle(document.querySelector('{css}')).backgroundColor")
    return tuple(int(v) for v in re.findall(r"\d+", found)[:3])


def seen(browser, css: str) -> int:
    """Pixels of an element's ground in a screenshot."""
    box = browser.evaluate(
        f"(() => {{ const n = document.querySelector('{css}'); n.scrollIntoView();"
        "const b = n.getClientRects()[0];"
        "return { x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height }; })()"
    )
    return chromium.count_near(chromium.pixels(browser.screenshot(box)), colour(browser, css), 8)


def test_a_prompt_streams_with_its_colours(page, served, slow):
    write(page, 0, "the cat sat on the mat")
    key(page, "Enter", 13)
    until(page, "panes[0].log.querySelector('.assistant')?.textContent.length > 3")
    partial = reply(page)
    assert page.evaluate(BUSY) == 1
    until(page, f"{BUSY} === 0")
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    whole = served.post(
        "/v1/chat/completions", messages=messages, temperature=0, max_tokens=256
    ).json()
    assert reply(page) == whole["choices"][0]["message"]["content"]
    assert len(partial) < len(reply(page))
    for css in (".assistant .a", ".legend .c"):
        assert seen(page, css) > 20, css
    assert colour(page, ".assistant .a") != colour(page, ".legend .c")
    assert int(page.evaluate("panes[0].node.querySelector('[data-stat=tokens]').textContent")) > 9
    assert "%" in page.evaluate("panes[0].node.querySelector('[data-stat=acceptance]').textContent")
    assert page.problems == []
    assert {url.partition(served.url)[0] for url in page.requests} <= {"", "data:,"}


def test_escape_stops_a_generation(page, served, slow):
    write(page, 0, "the old house in the street")
    key(page, "Enter", 13)
    until(page, "panes[0].log.querySelector('.assistant')?.textContent.length > 3")
    key(page, "Escape", 27)
    until(page, f"{BUSY} === 0")
    served.wait_idle()
    stopped = reply(page)
    assert stopped and page.evaluate("!panes[0].sendButton.disabled")
    assert aside(page) == "Stopped"
    write(page, 0, "the cat")
    key(page, "Enter", 13)
    until(page, "panes[0].messages.length === 3")
    assert page.problems == []


def test_four_rows_advance_on_their_own_clocks(page, served, slow):
    do(page, "$('panes').value = '4'; $('panes').dispatchEvent(new Event('change'))")
    for row, words in enumerate(("the cat", "the old house", "don't they", "naïve 🙂 street")):
        write(page, row, words)
    key(page, "Enter", 13, modifiers=2)
    tiny.eventually(lambda: served.metric("num_requests_running") == 4)
    until(page, f"{BUSY} === 0")
    counts = page.evaluate("panes.map((p) => p.node.querySelector('[data-stat=step]').textContent)")
    assert len(counts) == 4 and all(float(count) >= 1 for count in counts)
    assert len({reply(page, row) for row in range(4)}) == 4
    assert page.problems == []


def test_speculation_can_be_switched_off(page, served):
    do(page, "$('speculation').checked = false; $('max-tokens').value = 40")
    write(page, 0, "the cat sat on the mat")
    key(page, "Enter", 13)
    until(page, f"panes[0].messages.length === 2 && {BUSY} === 0")
    assert page.evaluate("document.querySelectorAll('.assistant .a').length") == 0
    assert page.evaluate("panes[0].node.querySelector('[data-stat=step]').textContent") == "1.00"


def test_what_the_server_refuses_is_shown(page):
    do(page, "$('max-tokens').value = 8000")
    write(page, 0, "the cat")
    key(page, "Enter", 13)
    until(page, "document.querySelector('.said.note')")
    assert "context" in page.evaluate("document.querySelector('.said.note').textContent")
    assert page.evaluate("panes[0].box.value") == "the cat", "it may be sent again"
    assert page.evaluate("document.querySelectorAll('.said.assistant').length") == 0


def test_an_empty_row_offers_examples(page, served):
    do(page, "$('max-tokens').value = 5")
    do(page, "document.querySelectorAll('.empty button')[1].click()")
    until(page, f"document.querySelector('.said.aside') && {BUSY} === 0")
    asked = page.evaluate("document.querySelector('.said.user').textContent")
    assert asked == page.evaluate("examples[1]") and aside(page) == "Ended at max tokens"
    assert page.evaluate("document.querySelectorAll('.empty').length") == 0
    do(page, "$('clear').click()")
    assert page.evaluate("document.querySelectorAll('.empty button').length") == 3


def test_clearing_in_the_middle_begins_a_new_conversation(page, served, slow):
    write(page, 0, "the old house in the street")
    key(page, "Enter", 13)
    until(page, "panes[0].log.querySelector('.assistant')?.textContent.length > 3")
    do(page, "$('clear').click()")
    until(page, f"{BUSY} === 0")
    assert page.evaluate("panes[0].messages.length") == 0
    assert page.evaluate("document.querySelectorAll('.said').length") == 0


def test_one_of_send_and_stop_is_there_and_keeps_the_focus(page, served, slow):
    shown = "[...document.querySelectorAll('form button')].filter((b) => b.offsetWidth)"
    assert page.evaluate(f"{shown}.map((b) => b.textContent)") == ["Send"]
    write(page, 0, "the old house in the street")
    do(page, "panes[0].sendButton.focus(); panes[0].sendButton.click()")
    assert page.evaluate(f"{shown}.map((b) => b.textContent)") == ["Stop"]
    assert page.evaluate("document.activeElement === panes[0].stopButton")
    do(page, "panes[0].stopButton.click()")
    until(page, f"{BUSY} === 0")
    assert page.evaluate("document.activeElement === panes[0].sendButton")


def test_a_reader_who_scrolled_up_is_left_there(page, served, slow):
    do(page, "for (let i = 0; i < 80; i++) panes[0].say('user', 'line ' + i)")
    assert page.evaluate("panes[0].log.scrollTop") > 100
    do(page, "panes[0].log.scrollTop = 0")
    write(page, 0, "the cat")
    key(page, "Enter", 13)
    until(page, "panes[0].log.querySelector('.assistant')?.textContent.length > 3")
    assert page.evaluate("panes[0].log.scrollTop") == 0


def test_text_is_never_markup(page):
    write(page, 0, "<img src=x onerror=alert(1)> <b>bold</b>")
    key(page, "Enter", 13)
    until(page, "document.querySelector('.said.user')")
    assert page.evaluate("document.querySelectorAll('.log img, .log b').length") == 0
    assert page.problems == []


def test_every_control_has_a_name_and_the_tab_key_reaches_it(page):
    names = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')].map((node) =>"
        "node.getAttribute('aria-label') || node.closest('label')?.textContent.trim()"
        "|| node.textContent.trim())"
    )
    assert (
        all(names) and page.evaluate("document.querySelectorAll('[tabindex=\"-1\"]').length") == 0
    )
    assert page.evaluate("document.querySelector('[role=status]').ariaLive") == "polite"


@pytest.mark.parametrize("width", [320, 800, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_light_dark_and_every_width(page, width, dark):
    page.load(width=width, dark=dark)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 20, 19)" if dark else "rgb(246, 246, 243)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("a", "c"):
        style = f"getComputedStyle(document.querySelector('.legend .{name}'))"
        ink, ground = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        assert contrast(ink, ground) >= 4.5


def contrast(one: str, two: str) -> float:
    """WCAG 2 contrast of two CSS colours."""
    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(css: str) -> float:
    parts = [int(v) / 255 for v in re.findall(r"\d+", css)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
