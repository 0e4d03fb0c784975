"""`dinov2 quickstart`: the three figures and where to go next."""

import re

import pytest

from tests.runs import SMALL, contents, only_sentence

TINY_SETS = (
    *(word for word in SMALL if not word.startswith("evaluation")),
    "train.dataset_path=toy:split=TRAIN:n=40",
    "evaluation.knn_train_dataset=toy:split=TRAIN:n=40",
    "evaluation.knn_val_dataset=toy:split=VAL:n=20",
)


def test_it_ends_with_three_figures_the_report_and_the_next_command(dinov2, here):
    ended = dinov2("quickstart", "--max-steps", "2", *TINY_SETS)
    assert ended.code == 0
    figures = re.findall(r"^  (raw pixels|untrained model|trained model) +\d+\.\d %$", ended.out, re.MULTILINE)
    assert figures == ["raw pixels", "untrained model", "trained model"]
    assert "runs/quickstart/report.html" in ended.out.replace("\\", "/")
    assert ended.out.rstrip().splitlines()[-1].startswith("next, with images of your own: dinov2 train --data DIR")
    assert (here / "runs" / "quickstart" / "summary.json").is_file()
    assert [path.name for path in here.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        (("optim.epoch=9",), "there is no key optim.epoch; the nearest is optim.epochs"),
        (("--output-dir", "file"), "the output folder file is a file; choose another path"),
        (("fast",), "'fast' is not an override; write key=value"),
    ],
)
def test_wrong_input_is_one_sentence_before_any_work(dinov2, here, words, sentence):
    (here / "file").write_text("mine")
    before = contents(here)
    ended = dinov2("quickstart", *TINY_SETS, *words)
    assert ended.code == 2 and ended.out == ""
    assert sentence in only_sentence(ended)
    assert contents(here) == before
