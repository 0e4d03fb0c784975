"""`dinov2 eval log-regression`, `linear`, `all` and `--dry-run`: what they print and write."""

import json
import re

import pytest
import torch

from dinov2.apps.evaluation import features
from dinov2.apps.evaluation.protocols import PROTOCOLS
from dinov2.cli.evaluate import METHOD_NAMES
from dinov2.pretrained import load
from tests.runs import contents, only_sentence, pictures

SETS = ("--train-dataset", "toy:split=TRAIN:n=60", "--val-dataset", "toy:split=VAL:n=30")
FIGURES = r"^(top-1|top-5|mean-per-class) +[\d.]+ % \([\d.]+ to [\d.]+\)$"


@pytest.mark.parametrize("name", ["log-regression", "logistic"])
def test_logistic_regression_prints_its_choice_and_its_figures(dinov2, here, run, name):
    ended = dinov2("eval", name, "--model", run, *SETS, "--C", 0.1, 1, "--output-dir", "out")
    assert ended.code == 0 and ended.err == ""
    assert re.search(r"^C = (0.1|1), chosen on 10 of 60 training images$", ended.out, re.MULTILINE)
    assert re.findall(FIGURES, ended.out, re.MULTILINE) == ["top-1", "top-5", "mean-per-class"]
    assert (here / "out" / "results_eval_log_regression.json").is_file()


def test_the_linear_probe_prints_its_choice_and_its_figures(dinov2, here, run):
    words = ("--iterations", 3, "--step-size", 16, "--learning-rates", 0.1, "--output-dir", "out")
    ended = dinov2("eval", "linear", "--model", run, *SETS, *words)
    assert ended.code == 0 and ended.err == ""
    assert "chosen on 10 of 60 training images among 4" in ended.out
    assert re.findall(FIGURES, ended.out, re.MULTILINE) == ["top-1", "top-5", "mean-per-class"]
    assert "note: own settings: 3 iterations of 16 images" in ended.out


def test_a_classifier_file_is_scored_on_several_sets(dinov2, here, run):
    width = 2 * load(run).embed_dim
    torch.save({"weight": torch.randn(10, width), "bias": torch.zeros(10)}, here / "head.pth")
    ended = dinov2(
        "eval", "linear", "--model", run, "--val-dataset", "toy:split=VAL:n=30", "--classifier-fpath", "head.pth",
        "--test-datasets", "toy:split=VAL:n=20", "--output-dir", "out",
    )  # fmt: skip
    assert ended.code == 0 and ended.err == ""
    assert "toy:split=VAL:n=30:\n" in ended.out and "toy:split=VAL:n=20:\n" in ended.out
    assert len(re.findall(FIGURES, ended.out, re.MULTILINE)) == 6


def test_everything_is_measured_compared_and_shown(dinov2, here, run):
    older = run / "eval" / "training_4" / "teacher_checkpoint.pth"
    ended = dinov2(
        "eval", "all", "--model", run, "--model", older, *SETS, "--methods", "knn", "log-regression",
        "--output-dir", "out",
    )  # fmt: skip
    assert ended.code == 0 and ended.err == ""
    assert len(re.findall(r"^fertig/training_\d+: k-NN k=20: top-1 [\d.]+ % \(", ended.out, re.MULTILINE)) == 2
    assert re.search(r"^k-NN: fertig/training_4 less fertig/training_11 is [+-][\d.]+ points", ended.out, re.MULTILINE)
    assert sorted(path.name for path in (here / "out").iterdir()) == ["results_eval_all.html", "results_eval_all.json"]


@pytest.mark.parametrize("task", ["knn", "log-regression", "linear", "all"])
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(dinov2, here, run, task, monkeypatch):
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    ended = dinov2("eval", task, "--model", run, "--dataset", "toy:n=50", "--dry-run", "--cache-dir", "kept")
    assert ended.code == 0 and ended.err == ""
    assert "toy:n=50: 50 images of 10 classes, features have to be extracted" in ended.out
    assert "40 images to train and 10 to score on" in ended.out
    assert re.search(r"[\d.,]+ synthetic images of 32 pixels a second", ended.out)
    assert re.search(rf"results would be in runs/\d+-\d+-{task}-\w+; nothing was written", ended.out)
    assert contents(here) == {}


def test_a_dry_run_of_several_models_plans_each_and_ends_once(dinov2, here, run):
    older = run / "eval" / "training_4" / "teacher_checkpoint.pth"
    ended = dinov2("eval", "all", "--model", run, "--model", older, "--dataset", "toy:n=50", "--dry-run")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.count("synthetic images") == 2
    assert ended.out.count("nothing was written") == 1 and ended.out.count("40 images to train") == 1


def test_the_methods_of_the_command_are_those_of_the_table(dinov2, run):
    assert [*METHOD_NAMES] == [*(protocol.key for protocol in PROTOCOLS), "retrieval"]
    ended = dinov2("eval", "all", "--model", run, *SETS, "--methods", "svm", "--dry-run")
    assert ended.code == 2
    assert "invalid choice: 'svm' (choose from" in ended.err


def test_a_dry_run_knows_the_sets_besides_and_that_a_classifier_needs_none_to_learn_from(dinov2, here, run):
    width = 2 * load(run).embed_dim
    torch.save({"weight": torch.randn(10, width), "bias": torch.zeros(10)}, here / "h.pth")
    words = ("--val-dataset", "toy:split=VAL:n=30", "--test-datasets", "toy:n=20", "--classifier-fpath", "h.pth")
    ended = dinov2("eval", "linear", "--model", run, *words, "--dry-run")
    assert ended.code == 0 and ended.err == ""
    assert re.findall(r"^(toy:.*): (\d+) images", ended.out, re.MULTILINE) == [
        ("toy:split=VAL:n=30", "30"), ("toy:n=20", "20"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words, sentence",
    [
        ((), "holds a backbone without a classifier"),
        (("--classifier-fpath", "no.pth"), "there is no weight file no.pth"),
    ],
)
def test_a_dry_run_misses_the_classifier_that_the_work_would_miss(dinov2, run, words, sentence):
    ended = dinov2("eval", "linear", "--model", run, "--val-dataset", "toy:split=VAL:n=30", *words, "--dry-run")
    assert ended.code == 2
    assert sentence in only_sentence(ended)


def test_a_dry_run_of_the_papers_protocol_counts_every_crop(dinov2, run):
    words = ("--protocol", "release", "--iterations", 30, "--step-size", 100)
    ended = dinov2("eval", "linear", "--model", run, *SETS, *words, "--no-cache", "--dry-run")
    assert "training takes 3,000 images, cropped and encoded anew each time" in ended.out
    assert "for 3,030 images, decoding apart" in ended.out


def test_a_dry_run_finds_what_is_kept(dinov2, run):
    words = ("eval", "knn", "--model", run, "--dataset", "toy:n=50", "--nb-knn", 3)
    assert dinov2(*words).code == 0
    ended = dinov2(*words, "--dry-run")
    assert "toy:n=50: 50 images of 10 classes, features are in the cache" in ended.out
    assert "needs about" not in ended.out


@pytest.mark.parametrize(
    "task, words, sentence",
    [
        ("log-regression", ("--train-dataset", "one"), "all labelled images of one are of the one class 'class0'"),
        ("log-regression", ("--C", "0", *SETS), "C must be positive, got [0.0]"),
        ("log-regression", ("--train-dataset", "flat"), "flat has no labels, which an evaluation needs"),
        ("linear", ("--learning-rates", "0", *SETS), "learning rates must be positive, got [0.0]"),
        ("linear", ("--val-dataset", "toy:n=20"), "a backbone without a classifier; give a --train-dataset"),
        ("linear", (), "no images to score were named"),
        ("knn", ("--dataset", "toy", "--val-dataset", "toy"), "one data set to be split and others besides were named"),
        ("knn", ("--resolution", "30", *SETS), "30 pixels is no multiple of the patch size 8; use 24 or 32"),
        ("knn", ("--cache-dir", "file", *SETS), "this was the --cache-dir, and --no-cache keeps nothing"),
        ("knn", (), "no labelled images were named; give --train-dataset and --val-dataset, or one --dataset"),
    ],
)
def test_wrong_input_is_one_sentence(dinov2, here, run, task, words, sentence, monkeypatch):
    monkeypatch.setattr(features, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    pictures(here / "one", n=4, classes=1)
    pictures(here / "flat")
    (here / "file").write_text("mine")
    before = contents(here)
    ended = dinov2("eval", task, "--model", run, *words)
    assert ended.code == 2
    assert sentence in only_sentence(ended)
    assert contents(here) == before


def test_fewer_images_than_neighbours_are_all_asked_with_a_note(dinov2, run):
    ended = dinov2("eval", "knn", "--model", run, "--dataset", "toy:n=50", "--nb-knn", 10, 200)
    assert ended.code == 0
    assert "note: k = 200 limited to the 40 training images" in ended.out


def test_results_name_no_path_of_this_machine(dinov2, here, run):
    pictures(here / "photos" / "train", n=24, classes=2)
    pictures(here / "photos" / "val", n=8, classes=2)
    sets = ("--train-dataset", "photos/train", "--val-dataset", "photos/val")
    assert dinov2("eval", "all", "--model", run, *sets, "--methods", "knn", "--output-dir", "out").code == 0
    for file in ("results_eval_all.json", "results_eval_all.html"):
        assert str(here) not in (here / "out" / file).read_text(encoding="utf-8")
    assert json.loads((here / "out" / "results_eval_all.json").read_text())["val_dataset"] == "photos/val"
