"""The doctor on single signs of the task: is there one, does the teacher move, does accuracy rise."""

from dataclasses import replace

import pytest

from dinov2.apps.doctor import diagnose, in_words
from tests.apps.doctor_logs import LN_K, ONE_VIEW, found, made_log


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("dino.loss_weight=0",), "dino.loss_weight is 0 and ibot.loss_weight too"),
        (("dino.loss_weight=0", "ibot.loss_weight=1"), "no patch is masked for the iBOT term"),
        (
            (
                "dino.loss_weight=0",
                "ibot.loss_weight=1",
                "ibot.mask_sample_probability=0.5",
                "ibot.mask_ratio_min_max=[0,0]",
            ),
            "no patch is masked for the iBOT term",
        ),
        ((*ONE_VIEW, "crops.local_crops_number=0"), "see the same pixels"),
        ((*ONE_VIEW, "crops.local_crops_scale=[1,1]"), "see the same pixels"),
    ],
)
def test_a_configuration_without_a_task_is_found_before_the_first_step(overrides, words):
    diagnosis = diagnose(made_log(0, overrides=overrides))
    assert diagnosis.verdict == "trivial" and words in in_words(diagnosis)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ONE_VIEW,  # but for its local crops, which are not the whole image
        ("crops.local_crops_number=0",),
        (*ONE_VIEW, "crops.local_crops_number=0", "crops.color_jitter_p=0.8"),
        (*ONE_VIEW, "crops.local_crops_number=0", "ibot.mask_sample_probability=0.5"),
        ("dino.loss_weight=0", "ibot.loss_weight=1", "ibot.mask_sample_probability=0.5"),
    ],
)
def test_a_configuration_that_asks_something_is_not_called_trivial(overrides):
    assert diagnose(made_log(0, overrides=overrides)).verdict == "too early"


def test_views_that_differ_in_one_way_alone_are_noted():
    colours = found(made_log(overrides=(*ONE_VIEW, "crops.local_crops_number=0", "crops.grayscale_p=0.2")), "views")
    assert "differ in colour alone" in colours[0].says and "crops.global_crops_scale" in colours[0].remedy
    places = found(made_log(overrides=("crops.color_jitter_p=0", "crops.grayscale_p=0")), "views")
    assert "place and size alone" in places[0].says and "crops.color_jitter_p=0.8" in places[0].remedy
    assert not found(made_log(), "views")


def test_an_ibot_term_without_masks_is_noted_beside_a_dino_term():
    diagnosis = diagnose(made_log(overrides=("ibot.loss_weight=1",)))
    assert diagnosis.verdict == "learns" and "no patch is ever masked" in in_words(diagnosis)


@pytest.mark.parametrize(
    "momentum, verdict",
    [(lambda i: 1.0, "frozen"), (lambda i: 0.9999, "frozen"), (lambda i: 0.99 if i < 200 else 1.0, "learns")],
    ids=["1 throughout", "0.9999 in 400 steps", "1 from the middle on"],
)
def test_a_momentum_counts_by_what_it_leaves_of_the_first_weights(momentum, verdict):
    log = replace(made_log(mom=momentum), cfg=None)
    log = replace(log, rows=[{**row, "health_marginal_entropy": LN_K, "health_kl_to_uniform": 0.0} for row in log.rows])
    assert diagnose(log).verdict == verdict
    if verdict == "frozen":
        kept = momentum(0) ** 391
        (finding,) = found(log, "teacher")
        assert (
            finding.facts["kept"] == pytest.approx(kept) and ("never" if kept == 1 else f"{kept:.0%}") in finding.says
        )


SHORT = ("train.OFFICIAL_EPOCH_LENGTH=5", "optim.warmup_epochs=0")


def test_a_short_trial_and_a_log_without_its_beginning_are_no_still_teachers():
    assert diagnose(made_log(5, mom=1.0, overrides=SHORT)).verdict == "too early"
    whole = made_log(100, mom=lambda i: 1.0 if i > 900 else 0.99)
    assert diagnose(replace(whole, rows=whole.rows[-9:])).verdict == "learns"


def test_a_learning_rate_of_zero_is_named():
    diagnosis = diagnose(made_log(lr=0.0, overrides=("optim.base_lr=0",)))
    assert diagnosis.verdict == "frozen" and "learning rate has been 0 in all 391 steps" in in_words(diagnosis)


def curve(*values):
    return {"k-NN top-1": [(100 * i + 99, float(value)) for i, value in enumerate(values)]}


FALLING = {"dino_local_crops_loss": lambda i: 3.0 - i / 400, "overrides": ("optim.epochs=4", "optim.warmup_epochs=1")}


@pytest.mark.parametrize(
    "values, verdict",
    [
        ((30.0, 30.5, 30.2), "no_transfer"),
        ((30.0, 24.0, 25.0), "no_transfer"),
        ((30.0, 33.0, 27.0), "no_transfer"),
        ((30.0, 33.0, 32.0), "learns"),
        ((30.0, 30.0), "learns"),  # two figures are too few
    ],
)
def test_accuracy_that_does_not_rise_while_the_loss_falls_is_no_transfer(values, verdict):
    log = replace(made_log(**FALLING), accuracies=curve(*values))
    assert diagnose(log).verdict == verdict
    if verdict == "no_transfer":
        assert "the DINO term fell from 4.00 to 3.1" in in_words(diagnose(log))


def test_one_accuracy_that_rises_is_use_enough():
    both = {**curve(30, 30, 30), "linear top-1": [(99, 40.0), (199, 44.0), (299, 46.0)]}
    assert diagnose(replace(made_log(**FALLING), accuracies=both)).verdict == "learns"


def test_accuracy_is_not_judged_in_the_first_half_of_a_run():
    young = made_log(**{**FALLING, "overrides": ("optim.epochs=10", "optim.warmup_epochs=1")})
    assert diagnose(replace(young, accuracies=curve(30, 30, 30))).verdict == "learns"


def test_a_training_that_began_from_weights_need_not_rise_but_must_not_fall():
    continued = made_log(**{**FALLING, "overrides": (*FALLING["overrides"], "student.pretrained_weights=file.pth")})
    assert diagnose(replace(continued, accuracies=curve(60, 60, 60))).verdict == "learns"
    assert diagnose(replace(continued, accuracies=curve(60, 55, 50))).verdict == "no_transfer"


def test_accuracy_is_held_against_the_untrained_network_and_raw_pixels_where_they_were_measured():
    log = replace(made_log(**FALLING), accuracies=curve(20, 24), baselines={"untrained": 23.5, "raw_pixels": 30.0})
    diagnosis = diagnose(log)
    assert diagnosis.verdict == "no_transfer" and "24.0 %, and 23.5 % without any training" in in_words(diagnosis)
    better = replace(log, accuracies=curve(20, 28), checkpoints=[400])
    assert diagnose(better).verdict == "learns" and "less than the 30.0 % of raw pixels" in in_words(diagnose(better))


def test_a_log_that_does_not_tell_is_not_called_too_early():
    diagnosis = diagnose(replace(made_log(), cfg=None))
    assert diagnosis.verdict == "unknown" and "config.yaml beside its log" in in_words(diagnosis)
    silent = made_log(dino_local_crops_loss=None, dino_global_crops_loss=None)
    rows = [{k: v for k, v in row.items() if "crops_loss" not in k} for row in silent.rows]
    assert "holds no DINO or iBOT term" in in_words(diagnose(replace(silent, rows=rows)))


def test_a_finished_run_that_was_too_short_is_not_told_to_wait():
    diagnosis = diagnose(made_log(6, every=10, overrides=SHORT))
    assert (diagnosis.state, diagnosis.verdict) == ("finished", "too early")
    assert "a longer run, of 100 steps at least" in in_words(diagnosis)
