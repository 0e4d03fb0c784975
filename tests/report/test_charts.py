import json
import math
import re
from html import unescape

import pytest

from dinov2.report import charts
from dinov2.report.charts import Level, Series, _ticks, smooth
from dinov2.report.render import render
from dinov2.report.run_record import RunRecord
from dinov2.report.training import training_report


def line_chart(series, **options):
    """The chart as it stands on a page; "" for none."""
    chart = charts.line_chart(series, **options)
    return "" if chart is None else render("line_chart.html.jinja", chart=chart)


def data_of(chart):
    return json.loads(unescape(re.search(r'data-plot="([^"]*)"', chart)[1]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 4000, [0, 1000, 2000, 3000, 4000]),
        (0.03, 0.11, [0.04, 0.06, 0.08, 0.1]),
        (-1.3, -0.3, [-1.2, -1.0, -0.8, -0.6, -0.4]),
        (7, 7, [7]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, expected):
    assert _ticks(low, high) == pytest.approx(expected)


def test_smoothing_keeps_a_straight_line_straight():
    line = [(i, 10 - 0.5 * i) for i in range(100)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])


def test_smoothing_averages_noise_away_and_skips_what_is_not_finite():
    noisy = [(i, 5 + (-1) ** i) for i in range(400)] + [(400, math.nan)]
    smoothed = smooth(noisy)
    assert len(smoothed) == 400
    assert all(abs(y - 5) < 0.1 for _, y in smoothed[50:-50])


def test_curve_points_are_where_their_values_are():
    chart = line_chart([Series("a", [(0, 0.0), (10, 100.0)])], title="T", scale="linear")
    # From 0 to 105 upwards on a square of 1000 whose origin is above: 0 lies on the bottom.
    assert 'd="M0 1000L1000 48"' in chart
    assert data_of(chart)["x"] == [0, 10]


def test_a_level_is_drawn_at_its_value_and_counts_for_the_range():
    chart = line_chart([Series("a", [(0, 10.0), (1, 20.0)])], title="T", levels=[Level("raw", 40.0)], unit=" %")
    assert "stroke-dasharray" in chart
    assert "raw 40 %" in chart
    assert re.search(r'<path d="M0 45H1000" stroke="var\(--c0\)"', chart)


def test_wide_ranges_of_positive_values_are_logarithmic():
    chart = line_chart([Series("a", [(0, 0.001), (1, 0.1), (2, 10.0)])], title="T")
    middle = re.search(r"L500 (\d+)L", chart)[1]
    assert int(middle) == 500


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart([Series("a", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])], title="T")
    assert data_of(chart)["series"] == [["a", 1, [[0, 1.0], [3, 2.0]]]]
    assert "nan" not in chart.lower() and "inf" not in chart.lower()


def test_a_chart_without_values_is_nothing():
    assert line_chart([Series("a", []), Series("b", [(0, math.nan)])], title="T") == ""


@pytest.mark.parametrize("values", [[(5, 3.0)], [(0, 3.0), (1, 3.0)], [(0, 0.0)], [(2, 1.0), (2, 2.0)]])
def test_single_points_and_constant_curves_are_drawn(values):
    chart = line_chart([Series("a", values)], title="T")
    assert re.search(r'd="M\d+ \d+(h0|L)', chart)


def test_long_curves_are_thinned_and_keep_their_ends():
    points = [(i, float(i)) for i in range(10_000)]
    kept = data_of(line_chart([Series("a", points)], title="T", scale="linear"))["series"][0][2]
    assert len(kept) <= 401
    assert (kept[0], kept[-1]) == ([0, 0.0], [9999, 9999.0])


def test_names_are_escaped():
    chart = line_chart([Series("<b>&", [(0, 1.0)]), Series('"x', [(0, 2.0)])], title="</figure><script>")
    assert "<script>" not in chart and "<b>" not in chart
    assert data_of(chart)["series"][0][0] == "<b>&"


def test_bars_show_their_values_and_never_leave_the_scale():
    page = training_report(RunRecord("run", summary={"raw_pixels": 25.04, "trained": 140.0}))
    assert "width:25.04%" in page and ">25.0 %<" in page
    assert "width:100.00%" in page
