"""The page in headless Chromium: no console error, no request, and plots that can be seen."""

import re

import pytest

from retort.report.page import render
from tests.report import chromium, sample_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium.executable() is None, reason="needs Debian's chromium"),
]

# Box of every plot on the page and the colours that its lines, bars and bands must show.
PLOTS = """
[...document.querySelectorAll("svg")].map((svg) => {
  const box = svg.getBoundingClientRect();
  const paint = (node) => node.classList.contains("bar") ? "fill" : "stroke";
  const colour = (node) => getComputedStyle(node)[paint(node)];
  const drawn = [...svg.querySelectorAll(".line, .bar")].filter((n) => n.getBBox().width > 4);
  return { key: svg.getAttribute("aria-labelledby"), colours: drawn.map(colour),
    clip: { x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height } };
})
"""


@pytest.fixture(scope="module")
def browser():
    started = chromium.Browser()
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(sample_run.records()), "utf-8")
    return path


def _hidden(browser, plots) -> list[tuple[str, str]]:
    """Plots of the open page of which a line or a bar cannot be seen in a screenshot."""
    hidden = []
    for plot in plots:
        rows = chromium.pixels(browser.screenshot(plot["clip"]))
        for colour in plot["colours"]:
            wanted = tuple(int(v) for v in re.findall(r"\d+", colour)[:3])
            if chromium.count_near(rows, wanted) < 60:
                hidden.append((plot["key"], colour))
    return hidden


def test_every_plot_shows_its_lines_and_bars(browser, page):
    browser.open(page)
    plots = browser.evaluate(PLOTS)
    assert len(plots) > 15 and all(plot["colours"] for plot in plots)
    assert _hidden(browser, plots) == []
    assert browser.problems == []
    assert browser.requests == [page.as_uri()]


def test_plots_show_in_the_dark(browser, page):
    browser.open(page, dark=True)
    assert _hidden(browser, browser.evaluate(PLOTS)[4:10]) == []
    assert browser.problems == []


def test_the_check_fails_on_plots_that_do_not_show(browser, page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace("</style>", "svg * {opacity: 0}</style>"))
    browser.open(broken)
    plots = browser.evaluate(PLOTS)[4:10]
    assert {key for key, _ in _hidden(browser, plots)} == {plot["key"] for plot in plots}


def test_the_check_fails_on_an_error_in_the_page(browser, page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8") + "<script>alert(1)</script><img src='x.png'>")
    browser.open(broken)
    assert len(browser.problems) >= 2  # the policy stops a script and an image that are not its own


def test_dark_and_light_differ(browser, page):
    grounds = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(246, 246, 243)", "rgb(20, 20, 19)"]


@pytest.mark.parametrize("width", [320, 390, 800, 1600])
def test_no_width_makes_the_page_scroll_sideways(browser, page, width):
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    texts = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
    assert min(browser.evaluate(texts)) >= 8


def test_hovering_shows_the_values_of_the_nearest_step(browser, page):
    browser.open(page)
    where = browser.evaluate(
        "(() => { const s = document.querySelector('svg[data-hover]');"
        "s.scrollIntoView({behavior: 'instant'}); "
        "const b = s.getBoundingClientRect(); return [b.right - 6, b.top + b.height / 2]; })()"
    )
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])
    tip = browser.evaluate("document.getElementById('tip').innerText")
    assert tip.startswith("step 120\ntraining") and "held out" in tip
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.evaluate("document.getElementById('tip').hidden")
    assert browser.problems == []
