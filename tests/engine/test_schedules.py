"""Schedules against those of the release, number by number."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dinov2.engine.schedules import SCALING_RULES, CosineScheduler, Schedules, scaled_lr, total_steps
from dinov2.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "schedules.json").read_text())
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
NAMES = [name for name in EXPECTED if name != "generic"]


def config(name="ssl_default", **optim):
    tree = copy.deepcopy(CONFIGS[name])
    tree["optim"].update(optim)
    return SimpleNamespace(**{section: SimpleNamespace(**values) for section, values in tree.items()})


def global_batch(name):
    return EXPECTED[name]["world_size"] * EXPECTED[name]["batch_size_per_gpu"]


@pytest.mark.parametrize("case", EXPECTED["generic"], ids=lambda case: str(case["arguments"]))
def test_the_scheduler_equals_that_of_the_release_and_stays_at_its_final_value(case):
    schedule = CosineScheduler(**case["arguments"])
    values = [schedule[it] for it in range(len(case["values"]))]
    assert len(values) == case["arguments"]["total_iters"] + 3
    np.testing.assert_allclose(values, case["values"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_five_schedules_of_a_release_configuration(name):
    cfg, expected = config(name), EXPECTED[name]
    schedules = Schedules.from_config(cfg, global_batch(name))
    assert total_steps(cfg) == expected["total_iterations"]
    hypers = [schedules.at(step) for step in expected["iterations"]]
    for schedule, values in expected["values"].items():
        np.testing.assert_allclose([getattr(hyper, schedule) for hyper in hypers], values, rtol=1e-12, atol=0)
        array = getattr(schedules, schedule).schedule
        assert array.dtype == np.float64
        assert len(array) == expected["schedule_lengths"][schedule]
        np.testing.assert_allclose(array.sum(), expected["sums"][schedule], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_grows_with_the_root_of_the_batch(name):
    optim = config(name).optim
    for world_size, lr in EXPECTED[name]["lr_after_scaling"].items():
        batch = int(world_size) * EXPECTED[name]["batch_size_per_gpu"]
        assert scaled_lr(optim, batch) == pytest.approx(lr, rel=1e-12)


def test_the_other_scaling_rules_and_an_unknown_one():
    optim = {"base_lr": 0.001}
    assert scaled_lr(SimpleNamespace(**optim, scaling_rule="linear_wrt_256"), 64) == pytest.approx(0.00025)
    assert scaled_lr(SimpleNamespace(**optim, scaling_rule="none"), 64) == 0.001
    with pytest.raises(ConfigError, match=f"'cubic'; choose one of {', '.join(SCALING_RULES)}"):
        scaled_lr(SimpleNamespace(**optim, scaling_rule="cubic"), 64)


def test_a_warm_up_longer_than_the_schedule_is_refused():
    with pytest.raises(ConfigError, match="cannot hold"):
        CosineScheduler(1.0, 0.0, total_iters=10, warmup_iters=8, freeze_iters=3)
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs is 10 but optim\.epochs is 4"):
        Schedules.from_config(config(epochs=4, warmup_epochs=10), 64)


def test_a_short_training_may_have_a_long_temperature_warm_up_and_a_frozen_last_layer():
    cfg = config(epochs=2, warmup_epochs=1, freeze_last_layer_epochs=5)
    cfg.train.OFFICIAL_EPOCH_LENGTH = 10
    schedules = Schedules.from_config(cfg, 64)
    assert total_steps(cfg) == 20
    assert schedules.at(19).teacher_temp < cfg.teacher.teacher_temp
    assert schedules.at(19).last_layer_lr == 0.0
    assert schedules.at(19).lr > 0.0


def test_no_temperature_warm_up_means_a_constant_temperature():
    cfg = config()
    cfg.teacher.warmup_teacher_temp_epochs = 0
    assert Schedules.from_config(cfg, 64).at(0).teacher_temp == cfg.teacher.teacher_temp


def test_freezing_the_last_layer_leaves_the_other_learning_rate_alone():
    schedules = Schedules.from_config(config(), 64)
    assert schedules.at(1249).last_layer_lr == 0.0 < schedules.at(1249).lr
    assert schedules.at(1250).last_layer_lr == schedules.at(1250).lr
