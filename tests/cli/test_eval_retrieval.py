"""`dinov2 eval retrieval` as a user meets it."""

import json
import os
import pickle
import re

import pytest

from dinov2.cli import evaluate
from dinov2.cli.evaluation import retrieval
from tests.runs import only_sentence, pictures


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setattr(evaluate, "_TASKS", tuple(dict.fromkeys((*evaluate._TASKS, retrieval))))


def test_figures_are_printed_with_intervals_and_written(dinov2, here, run):
    pictures(here / "photos", n=8, classes=2)
    ended = dinov2(
        "eval", "retrieval", "--model", run, "--query-dataset", "photos", "--k", "1", "3", "--output-dir", "out"
    )
    assert ended.code == 0, ended.err
    printed = re.findall(r"^ +(\S+) +([\d.]+) %  \([\d.]+ to [\d.]+\)$", ended.out, re.MULTILINE)
    assert [name for name, _ in printed] == ["mAP", "recall@1", "mP@1", "recall@3", "mP@3", "GAP"]
    rows = json.loads((here / "out" / "results_eval_retrieval.json").read_text())["rows"]
    assert [f"{row['value']:.2f}" for row in rows] == [value for _, value in printed]


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
