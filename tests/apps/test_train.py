"""Training from plain arguments, and k-NN evaluation on the way."""

import json

import pytest
import torch

from dinov2.apps.train import check_training, outcome_line, run_training, training_config
from dinov2.apps.training_evaluations import KNN_CURVE, accuracy_evaluation
from dinov2.configs import Config
from dinov2.engine.run_folder import RunFolder
from dinov2.errors import ConfigError, DataError
from dinov2.pretrained import load
from dinov2.train.setup import Training, build_training
from dinov2.train.train import Outcome
from tests.runs import SMALL, contents, pictures
from tests.train.tiny_run import tiny_config

SETS = ("evaluation.knn_train_dataset=toy:split=TRAIN:n=40", "evaluation.knn_val_dataset=toy:split=VAL:n=20")


def quiet(text: str) -> None:
    pass


def test_later_sources_win_and_data_wins_over_all(here):
    (here / "mine.yaml").write_text("optim:\n  epochs: 7\n  warmup_epochs: 2\n")
    cfg = training_config(
        data="toy:n=8", config_file="mine.yaml", overrides=["optim.warmup_epochs=1", "train.dataset_path=toy:n=9"]
    )
    assert (cfg.optim.epochs, cfg.optim.warmup_epochs, cfg.train.dataset_path) == (7, 1, "toy:n=8")
    assert training_config(preset="toy").train.dataset_path == "toy:split=TRAIN"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({}, "no images were named; add --data DIR"),
        ({"config_file": "train/vitl16_short"}, "no images were named"),
        ({"data": "toy:n=8", "preset": "toy", "config_file": "train/vitl16_short"}, "were both given"),
        ({"data": ""}, "the name of the data is empty"),
        ({"data": "toy:n=8", "preset": ""}, "the name of the preset is empty"),
        ({"data": "toy:n=8", "config_file": ""}, "the name of the config file is empty"),
    ],
)
def test_arguments_that_make_no_training_are_refused(arguments, reason):
    with pytest.raises(ConfigError) as refusal:
        training_config(**arguments)
    assert reason in str(refusal.value)


def test_a_data_set_that_was_named_without_its_place_is_asked_for_the_place():
    with pytest.raises(DataError, match="lacks root"):
        check_training(training_config(data=Config().train.dataset_path))


def test_the_default_data_set_is_one_that_cannot_be_trained_on():
    """`training_config` takes it for "none was named", which must stay true."""
    with pytest.raises(DataError, match="lacks root"):
        check_training(Config())


def test_the_curve_of_k_nn_accuracy_grows_with_the_run_and_is_not_doubled_by_a_resume(here):
    cfg = tiny_config(*SETS, "evaluation.eval_period_iterations=4", "train.checkpoint_every=2")
    folder, outcome = run_training(cfg, output_dir="run", max_steps=6, announce=quiet)
    assert folder.name == "run" and outcome.step == 6

    def curve() -> list[int]:
        points = json.loads((here / "run" / KNN_CURVE).read_text())
        assert all(0 <= point["top1"] <= 100 for point in points)
        return [point["iteration"] for point in points]

    assert curve() == [3, 5]
    run_training(cfg, output_dir="run", announce=quiet)
    assert curve() == [3, 5, 7, 11]
    # As after a kill that lost the last checkpoint: what is measured again replaces the old points.
    accuracy_evaluation(cfg)(_training(cfg), 5)
    assert curve() == [3, 5]


def _training(cfg: Config) -> Training:
    return build_training(cfg, RunFolder("run"))


def test_evaluation_does_not_change_the_training(here):
    run_training(tiny_config(), output_dir="plain", announce=quiet)
    run_training(tiny_config(*SETS, "evaluation.eval_period_iterations=3"), output_dir="evaluated", announce=quiet)
    plain, evaluated = (load(here / run).backbone.state_dict() for run in ("plain", "evaluated"))
    assert all(torch.equal(plain[key], evaluated[key]) for key in plain)


def test_further_evaluations_are_called_after_the_k_nn_one(here):
    seen = []

    def look(training, iteration):
        seen.append((iteration, (training.run.path / KNN_CURVE).exists()))

    run_training(tiny_config(*SETS), output_dir="run", max_steps=2, evaluations=[look], announce=quiet)
    assert seen == [(1, True)]


def test_unlabelled_evaluation_data_is_refused_before_training(here):
    pictures(here / "flat")
    cfg = tiny_config("evaluation.knn_train_dataset=flat", "evaluation.knn_val_dataset=flat")
    for call in (lambda: run_training(cfg, output_dir="run"), lambda: check_training(cfg, output_dir="run")):
        with pytest.raises(DataError, match="flat has no labels"):
            call()
    assert not (here / "run").exists()


def test_a_check_tells_what_would_happen_and_writes_nothing(here):
    text = check_training(tiny_config(), output_dir="run")
    assert "12 = 3 epochs of 4 steps" in text and "\nstudent:\n  arch: vit_nano\n" in text
    assert contents(here) == {}


def test_the_last_line_says_what_happened_and_how_to_go_on(tmp_path):
    done = Outcome(step=12_000, total=12_000, seconds=1.0, stopped_by=None, unreadable=0, skipped=0)
    assert outcome_line(done, tmp_path) == "12,000 of 12,000 steps done"
    broken = done._replace(step=7, stopped_by="SIGTERM", unreadable=3, skipped=2)
    line = outcome_line(broken, tmp_path / "mein Lauf")
    assert line.startswith("7 of 12,000 steps done; stopped by SIGTERM, a checkpoint is saved: the same command with ")
    assert f"--output-dir '{tmp_path / 'mein Lauf'}' goes on" in line
    assert "3 images could not be read, see unreadable_images.json" in line
    assert "2 steps skipped, see skipped_steps.json" in line


def test_small_is_what_tiny_runs_use():
    assert training_config(data="toy:split=TRAIN:n=40", preset="toy", overrides=SMALL) == tiny_config()
