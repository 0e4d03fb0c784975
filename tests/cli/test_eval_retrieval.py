"""`dinov2 eval retrieval` as a user meets it."""

import json
import os
import pickle
import re

import pytest

from dinov2.apps.evaluation import features
from tests.runs import contents, only_sentence, pictures


def test_figures_are_printed_with_intervals_and_written(dinov2, here, run):
    pictures(here / "photos", n=8, classes=2)
    ended = dinov2(
        "eval", "retrieval", "--model", run, "--query-dataset", "photos", "--k", "1", "3", "--output-dir", "out"
    )
    assert ended.code == 0, ended.err
    printed = re.findall(r"^(\S+) +([\d.]+) %( \([\d.]+ to [\d.]+\))?$", ended.out, re.MULTILINE)
    assert [name for name, _, interval in printed if interval] == ["mAP", "recall@1", "mP@1", "recall@3", "mP@3"]
    assert printed[-1][0] == "GAP"  # of all queries together, so that there is nothing to resample
    rows = json.loads((here / "out" / "results_eval_retrieval.json").read_text())["rows"]
    assert [f"{row['value']:.2f}" for row in rows] == [value for _, value, _ in printed]


def test_a_page_with_queries_and_what_they_found_is_written_beside_the_results(dinov2, here, run):
    pictures(here / "photos", n=8, classes=2)
    ended = dinov2("eval", "retrieval", "--model", run, "--query-dataset", "photos", "--output-dir", "out")
    assert ended.out.splitlines()[-1] == f"the page is {os.path.join('out', 'results_eval_retrieval.html')}"
    page = (here / "out" / "results_eval_retrieval.html").read_text(encoding="utf-8")
    # Eight queries, each with the seven others: three of its class and four of the other one.
    assert page.count('<figure class="query"') == 8
    assert page.count('<figure class="right"') == 8 * 3 and page.count('<figure class="wrong"') == 8 * 4
    assert str(here) not in page


@pytest.mark.parametrize("words", [("--query-dataset", "photos"), ("--ground-truth", "gnd.pkl", "--images", "photos")])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(dinov2, here, run, words, monkeypatch):
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    pictures(here / "photos", n=8, classes=2 if "--query-dataset" in words else 0)
    truth = {"imlist": ["000", "001"], "qimlist": ["002"], "gnd": [{"easy": [0], "hard": [], "junk": []}]}
    (here / "gnd.pkl").write_bytes(pickle.dumps(truth))
    before = contents(here)
    ended = dinov2("eval", "retrieval", "--model", run, *words, "--dry-run", "--cache-dir", "kept")
    assert ended.code == 0 and ended.err == ""
    assert re.search(r"^\w+: \d images.*, features have to be extracted$", ended.out, re.MULTILINE)
    assert re.search(r"^results would be in runs/\d+-\d+-retrieval-\w+; nothing was written$", ended.out, re.MULTILINE)
    assert contents(here) == before


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("code has run",)


def test_a_ground_truth_that_holds_code_is_refused_in_one_sentence(dinov2, here, run):
    (here / "gnd.pkl").write_bytes(pickle.dumps({"imlist": Code()}))
    ended = dinov2("eval", "retrieval", "--model", run, "--ground-truth", "gnd.pkl", "--images", ".")
    assert ended.code == 2
    assert "do not trust this file" in only_sentence(ended)
    assert not (here / "code has run").exists()


def test_the_help_shows_both_forms(dinov2):
    ended = dinov2("eval", "retrieval", "--help")
    assert ended.code == 0
    assert "--gallery-dataset" in ended.out and "--ground-truth" in ended.out
