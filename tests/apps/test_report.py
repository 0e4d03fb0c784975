"""The page about a run: where it is written."""

import shutil

import pytest

from dinov2.apps.report import report
from dinov2.errors import ConfigError, DataError
from tests.runs import contents


def test_the_page_goes_where_it_is_asked_for(run, here):
    (here / "pages").mkdir()
    assert report(run, output="pages").resolve() == (here / "pages" / "report.html").resolve()
    page = report(str(run), output="new/folder/page.html")
    assert page.resolve() == (here / "new" / "folder" / "page.html").resolve()
    text = page.read_text(encoding="utf-8")
    assert f"<title>{run.name}: training report</title>" in text and "<svg" in text


def test_by_default_the_page_is_in_the_run(run, here):
    shutil.copytree(run, "copy")
    for nothing in (None, ""):
        assert report("copy", output=nothing).resolve() == (here / "copy" / "report.html").resolve()


def test_what_is_no_run_and_what_cannot_be_written_is_refused(run, here):
    (here / "file").write_text("mine")
    before = contents(here)
    with pytest.raises(DataError, match="there is no folder nowhere; give the folder of a run"):
        report("nowhere")
    with pytest.raises(DataError, match="holds nothing of a training run"):
        report(here)
    with pytest.raises(ConfigError, match="file is a file"):
        report(run, output="file/page.html")
    assert contents(here) == before
