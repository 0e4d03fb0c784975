"""Accuracies on a training's schedule."""

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dinov2.apps.train import run_training
from dinov2.apps.training_evaluations import EVALUATION_METRICS, KNN_CURVE, TASKS
from dinov2.configs.run_sections import TRAINING_EVALUATIONS
from dinov2.encode.stream import Features
from dinov2.engine.metrics import read_metrics
from dinov2.errors import ConfigError
from dinov2.pretrained import load
from tests.train.tiny_run import tiny_config

SETS = ("evaluation.knn_train_dataset=toy:split=TRAIN:n=40", "evaluation.knn_val_dataset=toy:split=VAL:n=20")
BOTH = (*SETS, "evaluation.tasks=knn,logistic", "evaluation.eval_period_iterations=4", "train.checkpoint_every=2")


def quiet(text: str) -> None:
    pass


def test_each_task_has_a_curve_and_a_resume_replaces_what_it_measures_again(here):
    run_training(tiny_config(*BOTH), output_dir="run", max_steps=6, announce=quiet)
    run_training(tiny_config(*BOTH), output_dir="run", announce=quiet)
    rows = read_metrics(here / "run" / EVALUATION_METRICS)
    top1 = [(row["iteration"], row["task"], row["setting"]) for row in rows if row["metric"] == "top-1"]
    expected = [(i, task, setting) for i in (3, 5, 7, 11) for task, setting in (("knn", "k=20"), ("logistic", "C=1"))]
    assert top1 == expected
    assert all(0 <= row["value"] <= 100 for row in rows)
    curve = json.loads((here / "run" / KNN_CURVE).read_text())
    assert curve == [
        {"iteration": row["iteration"], "top1": row["value"]}
        for row in rows
        if row["task"] == "knn" and row["metric"] == "top-1"
    ]


def test_evaluations_do_not_change_the_training(here):
    run_training(tiny_config("student.drop_path_rate=0.2"), output_dir="plain", announce=quiet)
    run_training(tiny_config("student.drop_path_rate=0.2", *BOTH), output_dir="evaluated", announce=quiet)
    plain, evaluated = (load(here / run).backbone.state_dict() for run in ("plain", "evaluated"))
    assert all(torch.equal(plain[key], evaluated[key]) for key in plain)


def test_the_logistic_figure_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(120) % 3
    centres = torch.randn(3, 8)
    rows = centres[labels] + 1.5 * torch.randn(120, 8)
    train, val = Features(rows[:80], labels[:80]), Features(rows[80:], labels[80:])
    (row,) = TASKS["logistic"](train, val, tiny_config(), torch.device("cpu"))
    oracle = linear_model.LogisticRegression(C=1.0, max_iter=1000, tol=1e-8)
    oracle.fit(normalize(train.features, dim=1).numpy(), train.labels.numpy())
    answers = oracle.predict(normalize(val.features, dim=1).numpy())
    assert row.value == pytest.approx(100 * np.mean(answers == val.labels.numpy()))


def test_the_linear_probe_tells_apart_what_a_line_does():
    labels = torch.arange(200) % 2
    rows = torch.where(labels[:, None] > 0, 1.0, -1.0) * torch.ones(8) + 0.1 * torch.randn(200, 8)
    train, val = Features(rows[:160], labels[:160]), Features(rows[160:], labels[160:])
    rows = TASKS["linear"](train, val, tiny_config(), torch.device("cpu"))
    assert {row.task for row in rows} == {"linear"}
    assert next(row.value for row in rows if row.metric == "top-1") == 100


def test_an_unknown_task_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"evaluation\.tasks is 'quiz'; write knn or logistic or linear"):
        tiny_config("evaluation.tasks=knn,quiz")


def test_the_configuration_knows_every_task():
    assert tuple(TASKS) == TRAINING_EVALUATIONS
