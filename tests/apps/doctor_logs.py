"""Logs for the doctor's tests: where the recorded ones are, and how to make one."""

import math
from dataclasses import replace
from pathlib import Path

from dinov2.apps.doctor import diagnose
from dinov2.apps.doctor.run_log import RunLog
from tests.train.tiny_run import tiny_config

__all__ = ["LN_K", "ONE_VIEW", "RECORDED", "found", "made_log", "without_health"]

RECORDED = Path(__file__).parent / "recorded_runs"

# The tiny configuration has 32 prototypes.
LN_K = math.log(32)

ONE_VIEW = ("crops.global_crops_scale=[1,1]", "crops.color_jitter_p=0", "crops.grayscale_p=0", "crops.blur_p=[0,0,0]")


def without_health(log):
    rows = [{k: v for k, v in row.items() if not k.startswith(("health_", "grad_norm_"))} for row in log.rows]
    return replace(log, rows=rows)


def made_log(n=40, *, every=10, overrides=(), **values):
    """A log of `n` rows; each value is a number or a function of the iteration."""
    cfg = tiny_config("train.OFFICIAL_EPOCH_LENGTH=100", "optim.epochs=10", "train.log_every=10", *overrides)
    given = {
        "iter_time": 0.1,
        "data_time": 0.01,
        "lr": 1e-3,
        "teacher_temp": 0.04,
        "current_batch_size": 64,
        "dino_local_crops_loss": 2.0,
        "dino_global_crops_loss": 1.0,
        "total_loss": 3.0,
        **values,
    }
    rows = [
        {"iteration": i, **{key: value(i) if callable(value) else value for key, value in given.items()}}
        for i in range(0, n * every, every)
    ]
    return RunLog("made", rows, cfg)


def found(log, subject):
    return [finding for finding in diagnose(log).findings if finding.subject == subject]
