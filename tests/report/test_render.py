"""Pages without jinja2, and what every page has in common."""

import sys

import pytest

from dinov2.errors import MissingDependency
from dinov2.report import render
from dinov2.report.neighbours import neighbour_page


@pytest.fixture
def without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    render._environment.cache_clear()
    yield
    render._environment.cache_clear()


def test_without_jinja2_one_sentence_names_what_to_install(without_jinja2):
    for write in (render.require_templates, lambda: neighbour_page("title", facts=[])):
        with pytest.raises(MissingDependency, match=r"an HTML page needs .* pip install 'dinov2-anywhere\[report\]'$"):
            write()


def test_a_value_that_a_template_lacks_is_an_error_and_not_a_gap():
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError):
        render.render("neighbours.html.jinja", heading="title")
