"""Health without labels, measured while a training runs."""

import math
from dataclasses import replace

import pytest
import torch

from dinov2.analysis.health import assignment_health, rank_me
from dinov2.engine.metrics import read_metrics
from dinov2.engine.run_folder import RunFolder
from dinov2.loss.sinkhorn import sinkhorn_knopp
from dinov2.train.monitoring import health_is_due, training_health
from dinov2.train.setup import batches, build_training
from dinov2.train.train import train
from tests.train.ssl_golden import HYPER as ANY_HYPER
from tests.train.tiny_run import tiny_config

HYPER = ANY_HYPER._replace(teacher_temp=0.04)

PATCHES_TOO = ("ibot.loss_weight=1", "ibot.mask_sample_probability=0.5")


def rows_of(run):
    return read_metrics(run / "training_metrics.json")


def trained(run, *overrides):
    train(tiny_config(*overrides), run, announce=lambda text: None)
    return rows_of(run)


def health_of(row):
    return {key.removeprefix("health_"): value for key, value in row.items() if key.startswith("health_")}


@pytest.mark.parametrize("overrides", [(), PATCHES_TOO, ("train.centering=centering", "student.drop_path_rate=0.2")])
def test_a_training_that_is_watched_equals_one_that_is_not_bit_for_bit(tmp_path, overrides):
    watched = trained(tmp_path / "watched", "evaluation.health_period_iterations=1", *overrides)
    alone = trained(tmp_path / "alone", "evaluation.health_period_iterations=0", *overrides)
    assert all(health_of(row) for row in watched) and not any(health_of(row) for row in alone)
    for one, other in zip(watched, alone, strict=True):
        assert {key: one[key] for key in other if "time" not in key and key != "images_per_second"} == {
            key: value for key, value in other.items() if "time" not in key and key != "images_per_second"
        }
    files = [
        run / "eval" / "training_11" / "teacher_checkpoint.pth" for run in (tmp_path / "watched", tmp_path / "alone")
    ]
    weights = [torch.load(file, weights_only=True)["teacher"] for file in files]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_measures_are_those_of_the_teachers_tokens_and_assignments(tmp_path):
    training = build_training(tiny_config(*PATCHES_TOO), RunFolder(tmp_path))
    batch = next(iter(batches(training)))
    health = health_of(training_health(training, batch, HYPER))
    with torch.no_grad():
        cls = training.objective.teacher["backbone"](batch.global_crops)
        scores = training.objective.teacher["dino_head"](cls)
        assignments = sinkhorn_knopp(scores, 0.04)
    assert health["rank_me"] == pytest.approx(rank_me(cls), rel=1e-5)
    assert health["teacher_entropy"] == pytest.approx(assignment_health(assignments)["teacher_entropy"], rel=1e-5)
    assert health["rank_bound"] == min(8, 64)
    assert 0 <= health["patch_teacher_entropy"] <= health["patch_marginal_entropy"] + 1e-9 <= math.log(32) + 1e-6


def test_identical_images_are_duplicates_at_no_distance(tmp_path):
    training = build_training(tiny_config(), RunFolder(tmp_path))
    batch = next(iter(batches(training)))
    batch.global_crops.copy_(batch.global_crops[:1].expand_as(batch.global_crops))
    health = health_of(training_health(training, batch, HYPER))
    assert health["duplicates"] == 1 and health["koleo_distance"] < 1e-4 and health["rank"] < 2


def test_a_network_that_is_not_finite_has_no_health_and_stops_nobody(tmp_path):
    training = build_training(tiny_config(), RunFolder(tmp_path))
    batch = next(iter(batches(training)))
    training.objective.teacher["backbone"].cls_token.data.fill_(torch.nan)
    assert training_health(training, batch, HYPER) == {}


def without_masks(batch):
    return replace(batch, masked_indices=batch.masked_indices[:0])


def test_without_masked_patches_there_are_no_figures_of_patches_assignments(tmp_path):
    training = build_training(tiny_config(*PATCHES_TOO), RunFolder(tmp_path))
    health = health_of(training_health(training, without_masks(next(iter(batches(training)))), HYPER))
    assert "teacher_entropy" in health and "patch_teacher_entropy" not in health


def test_without_the_dino_term_patches_alone_are_judged(tmp_path):
    training = build_training(
        tiny_config("dino.loss_weight=0", "ibot.separate_head=true", *PATCHES_TOO), RunFolder(tmp_path)
    )
    health = health_of(training_health(training, next(iter(batches(training))), HYPER))
    assert "teacher_entropy" not in health and "patch_teacher_entropy" in health


def test_health_is_measured_at_the_first_row_of_each_period_and_at_the_end():
    cfg = tiny_config("train.log_every=30", "evaluation.health_period_iterations=100")
    logged = [step for step in range(0, 400, 30) if health_is_due(cfg, step, total=400)]
    assert logged == [0, 120, 210, 300]
    assert health_is_due(cfg, 399, total=400)
    never = tiny_config("evaluation.health_period_iterations=0")
    assert not any(health_is_due(never, step, total=400) for step in range(400))


def test_a_resumed_run_has_the_health_of_the_unbroken_one(tmp_path):
    cfg = tiny_config("evaluation.health_period_iterations=4")
    train(cfg, tmp_path / "whole", announce=lambda text: None)
    train(cfg, tmp_path / "parts", max_steps=6, announce=lambda text: None)
    train(cfg, tmp_path / "parts", announce=lambda text: None)
    whole, parts = ([{k: v for k, v in health_of(row).items() if k != "time"} for row in rows_of(tmp_path / name)]
                    for name in ("whole", "parts"))  # fmt: skip
    assert whole == parts and sum(map(bool, whole)) == 4
