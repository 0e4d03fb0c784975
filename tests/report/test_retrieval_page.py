"""The page of a retrieval, from plain values."""

import math
import re

from dinov2.eval.metrics import Estimate
from dinov2.report.neighbours import Shot, ShotRow
from dinov2.report.retrieval import QueryGroup, RetrievalRecord, retrieval_page

ROW = ShotRow(
    (Shot(None, "<cat>", "query", "a&b.jpg", "query"), Shot(b"jpeg", "dog", "0.50", "d.jpg", "wrong")), "Average 5 %."
)


def record(**changes) -> RetrievalRecord:
    values = {
        "title": "mine on <photos>",
        "facts": [("queries", "8")],
        "figures": {"": {"mAP": Estimate(0.5, 0.25, 0.75), "GAP": Estimate(0.4, math.nan, math.nan)}},
        "precisions": [0.0, 0.05, 1.0, *[0.5] * 9],
        "groups": [QueryGroup("Queries", "On the left", [ROW])],
        "measured": {"precision": "float32"},
    }
    return RetrievalRecord(**{**values, **changes})


def test_every_text_is_escaped():
    page = retrieval_page(record(notes=["<note>"]))
    assert "mine on &lt;photos&gt;" in page and "&lt;cat&gt;" in page and "a&amp;b.jpg" in page
    assert "&lt;note&gt;" in page
    assert not re.search(r"<(photos|cat|note)>", page)


def test_a_figure_without_an_interval_has_a_point_and_no_range():
    page = retrieval_page(record())
    assert page.count('class="point"') == 2 and page.count('class="range"') == 1
    assert "left:25.00%;right:calc(100% - 75.00%)" in page
    assert 'aria-label="GAP: 40.0 %"' in page


def test_queries_are_counted_by_their_average_precision():
    page = retrieval_page(record())
    assert re.findall(r"<span>(\d+)</span><i", page) == ["2", "0", "0", "0", "0", "9", "0", "0", "0", "1"]
    assert 'class="histogram"' not in retrieval_page(record(precisions=[0.5] * 9))


def test_protocols_stand_below_their_names():
    figures = {name: {"mAP": Estimate(0.5, 0.4, 0.6)} for name in ("easy", "hard")}
    page = retrieval_page(record(figures=figures))
    assert re.findall(r"<h3>(easy|hard)</h3>", page) == ["easy", "hard"]
    assert "GAP" not in page  # what is not shown is not explained


def test_nothing_is_loaded_from_elsewhere():
    page = retrieval_page(record())
    assert "http:" not in page and "https:" not in page and "default-src 'none'" in page
