"""`dinov2 report`."""

import shutil

import pytest

from tests.runs import contents, only_sentence


def test_the_page_is_written_into_the_run(dinov2, here, run):
    shutil.copytree(run, here / "run ü")
    ended = dinov2("report", "run ü")
    assert ended.code == 0 and ended.out.startswith("written: ")
    assert "<html" in (here / "run ü" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [("-o", "pages/one.html"), ("--output", "pages")])
def test_the_page_is_written_where_asked_for(dinov2, here, run, words):
    (here / "pages").mkdir()
    before = contents(run)
    assert dinov2("report", run, *words).code == 0
    assert [path.suffix for path in (here / "pages").iterdir()] == [".html"]
    assert contents(run) == before


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("nowhere",), "there is no folder nowhere; give the folder of a run"),
        (("file",), "there is no folder file; give the folder of a run"),
        (("empty",), "empty holds nothing of a training run"),
        (("RUN", "-o", "file/page.html"), "file is a file; choose another"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_everything_as_it_was(dinov2, here, run, words, sentence):
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    before = contents(here)
    ended = dinov2("report", *(run if word == "RUN" else word for word in words))
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before
