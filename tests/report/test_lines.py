"""What a line plot draws, and that it loses no extreme value."""

import json
import math
import re

from retort.report.lines import BOTTOM, LEFT, RIGHT, TOP, LinePlot, Series, draw, thin
from tests.report.test_html import parse


def _plot(*series, **more):
    return LinePlot("key", "Title", "Hint.", series, **more)


def _svg(plot):
    return re.search(r"<svg.*?</svg>", draw(plot), re.DOTALL)[0]


def test_points_lie_where_their_values_say():
    svg = _svg(_plot(Series("a", [(0, 0.0), (10, 1.0)]), y_range=(0, 1)))
    assert f'd="M{float(LEFT)} {float(BOTTOM)}L{float(RIGHT)} {float(TOP)}"' in svg


def test_a_value_that_is_not_finite_breaks_the_line_and_is_counted():
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0), (5, 3.0)]
    drawn = draw(_plot(Series("a", points)))
    path = re.search(r'class="line" d="([^"]*)"', drawn)[1]
    assert path.count("M") == 2 and "nan" not in path
    assert "not finite leave gaps: 1." in drawn


def test_one_point_is_a_dot_and_no_line():
    svg = _svg(_plot(Series("a", [(3, 2.0)])))
    assert svg.count("<circle") == 1 and 'class="line"' not in svg


def test_all_values_lost_still_draws():
    assert "<svg" in draw(_plot(Series("a", [(1, math.nan), (2, math.inf)])))


def test_thinning_keeps_spikes_order_and_size():
    points = [(i, 1.0) for i in range(10_000)]
    points[777], points[5001] = (777, 99.0), (5001, -99.0)
    points[9000] = (9000, math.nan)
    kept = thin(points)
    assert len(kept) <= 401
    assert {(777, 99.0), (5001, -99.0)} <= set(kept)
    assert any(math.isnan(v) for _, v in kept)
    assert [s for s, _ in kept] == sorted(s for s, _ in kept)


def test_a_band_is_shaded_and_inside_the_axes():
    band = [(1, 0.2, 0.9), (2, 0.1, 5.0)]
    svg = _svg(_plot(Series("a", [(1, 0.5), (2, 0.6)], band)))
    path = re.search(r'class="band s1" d="M([^"]*)Z"', svg)[1]
    heights = [float(pair.split()[1]) for pair in path.split("L")]
    assert len(heights) == 4 and all(TOP <= h <= BOTTOM for h in heights)


def test_a_reference_line_is_labelled_and_inside_the_axes():
    svg = _svg(_plot(Series("a", [(1, 0.5), (2, 0.6)]), references=((0.95, "limit 0.95"),)))
    at = float(re.search(r'<line class="reference"[^>]*y1="([^"]*)"', svg)[1])
    assert TOP <= at <= BOTTOM and "limit 0.95" in svg


def test_it_reads_without_seeing():
    parsed = parse(
        draw(_plot(Series("a", [(1, 4.0), (9, 2.5)]), Series("b", [(1, 1.0), (9, 7.0)])))
    )
    assert "a from 4 at step 1" in parsed.text or "a from 4.00 at step 1" in parsed.text
    labels = next(a["aria-labelledby"] for tag, a in parsed.tags if tag == "svg").split()
    ids = {a.get("id") for _, a in parsed.tags}
    assert set(labels) <= ids
    assert parsed.text.count("2.50") >= 2  # in the legend and in the table


def test_hover_data_name_each_step_once():
    svg = _svg(_plot(Series("a", [(1, 0.5), (2, 0.25)]), Series("b", [(2, 3.0)])))
    data = json.loads(parse(svg).tags[0][1]["data-hover"])
    assert data["names"] == ["a", "b"]
    assert [c[1:] for c in data["columns"]] == [[1, [[0, "0.500"]]], [2, [[0, "0.250"], [1, "3"]]]]


def test_a_long_log_gives_a_short_table_that_says_so():
    drawn = draw(_plot(Series("a", [(i, float(i)) for i in range(1000)])))
    assert drawn.count("<tr>") <= 43 and "every 25th record" in drawn
