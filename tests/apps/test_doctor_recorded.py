"""The doctor's verdict on runs that were really trained (tests/apps/recorded_runs)."""

from dataclasses import replace

import pytest

from dinov2.apps.doctor import VERDICTS, diagnose, examine_run, in_words
from dinov2.apps.doctor.run_log import read_run_log
from tests.apps.doctor_logs import RECORDED, without_health

# Runs that were trained, four of them made to fail.

EXPECTED = {
    "healthy": ("learns", ""),
    "collapse": ("collapsed", "sinkhorn_knopp"),
    "learning_rate": ("diverged", "optim.base_lr"),
    "temperature": ("uniform", "teacher.teacher_temp=0.04"),
    "data_bound": ("data_bound", "train.cache_dataset=true"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_verdict_on_a_recorded_run_is_right_and_says_what_to_try(name):
    verdict, remedy = EXPECTED[name]
    diagnosis = examine_run(RECORDED / name)
    assert (diagnosis.state, diagnosis.verdict) == ("finished", verdict)
    assert diagnosis.healthy == (verdict == "learns")
    problems = [finding.remedy for finding in diagnosis.findings if finding.level == "problem"]
    assert remedy in "".join(problems[:1])
    assert in_words(diagnosis).startswith(f"{name}: {verdict} ({VERDICTS[verdict]}), finished")


@pytest.mark.parametrize("name", EXPECTED)
def test_the_verdict_needs_no_health_where_the_losses_alone_show_it(name):
    """As from the log of the public release, which has none of our keys."""
    assert diagnose(without_health(read_run_log(RECORDED / name))).verdict == EXPECTED[name][0]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_verdict_is_the_same_with_health_at_the_default_period(name):
    """The runs were recorded with health in every row; by default it is in every tenth."""
    log = read_run_log(RECORDED / name)
    rows = [
        {k: v for k, v in row.items() if row["iteration"] % 100 == 0 or not k.startswith("health_")} for row in log.rows
    ]
    assert diagnose(replace(log, rows=rows)).verdict == EXPECTED[name][0]


def test_the_healthy_run_never_looks_ill_on_its_way():
    log = read_run_log(RECORDED / "healthy")
    verdicts = [diagnose(replace(log, rows=log.rows[:n], accuracies={})).verdict for n in range(1, len(log.rows) + 1)]
    assert set(verdicts) == {"too early", "learns"} and verdicts == sorted(verdicts, reverse=True)


def test_the_healthy_run_is_too_young_to_judge_in_its_first_steps():
    log = read_run_log(RECORDED / "healthy")
    assert diagnose(replace(log, rows=log.rows[:7], accuracies={})).verdict == "too early"


@pytest.mark.parametrize("name", ["collapse", "data_bound"])
def test_what_is_plain_is_said_early(name):
    log = read_run_log(RECORDED / name)
    assert diagnose(replace(log, rows=log.rows[: len(log.rows) // 2], accuracies={})).verdict == EXPECTED[name][0]


# Failures that were recorded after most of the rules; the rules for them were written in the knowledge of these runs.


def test_the_recorded_failures_are_what_their_names_say():
    still, one_view = (read_run_log(RECORDED / name) for name in ("still_teacher", "one_view"))
    assert {row["mom"] for row in still.rows} == {1.0}
    assert [value for _, value in still.accuracies["k-NN top-1"]] == [20.4, 20.4, 20.4]
    assert min(row["health_marginal_entropy"] - row["health_teacher_entropy"] for row in still.rows) > 0.08
    assert (one_view.cfg.crops.global_crops_scale, one_view.cfg.crops.local_crops_number) == ((1.0, 1.0), 0)
    assert [value for _, value in one_view.accuracies["k-NN top-1"]] == [18.6, 19.4, 19.2]  # 20.4 % before training


@pytest.mark.parametrize("known_of", ["log and configuration", "log", "configuration", "losses and log"])
def test_a_teacher_that_never_moves_is_named_with_its_momentum(known_of):
    log = read_run_log(RECORDED / "still_teacher")
    log = {
        "log and configuration": log,
        "log": replace(log, cfg=None),
        "configuration": replace(log, rows=[{k: v for k, v in row.items() if k != "mom"} for row in log.rows]),
        "losses and log": without_health(log),
    }[known_of]
    diagnosis = diagnose(log)
    assert (diagnosis.verdict, diagnosis.healthy) == ("frozen", False)
    decides = diagnosis.findings[1]
    assert "never moves, because its momentum is 1" in decides.says and "20.4 -> 20.4 %" in decides.says
    assert "teacher.momentum_teacher=0.9" in decides.remedy
    assert not any("longer run" in finding.remedy or "uniform" in finding.says for finding in diagnosis.findings)
    beside = [finding for finding in diagnosis.findings if finding.subject == "learning"]
    assert all((finding.level, finding.remedy) == ("note", "") for finding in beside)
    assert "0.002 nats" in in_words(diagnosis) or known_of == "losses and log"


def test_a_training_on_one_view_is_named_from_its_configuration():
    diagnosis = examine_run(RECORDED / "one_view")
    assert (diagnosis.verdict, diagnosis.healthy) == ("trivial", False)
    decides, beside = diagnosis.findings[1:3]
    assert "see the same pixels" in decides.says and "crops.local_crops_number=8" in decides.remedy
    assert "1.588 nats" in beside.says and (beside.level, beside.remedy) == ("note", "")


def test_a_training_on_one_view_is_named_from_its_accuracy_where_the_configuration_does_not_tell():
    log = read_run_log(RECORDED / "one_view")
    for unaware in (replace(log, cfg=None), replace(log, cfg=read_run_log(RECORDED / "healthy").cfg)):
        diagnosis = diagnose(unaware)
        assert (diagnosis.verdict, diagnosis.healthy) == ("no_transfer", False)
        assert "k-NN top-1 did not rise in 3 evaluations (18.6 -> 19.2 %)" in in_words(diagnosis)


def test_a_training_with_koleo_alone_has_no_task():
    diagnosis = examine_run(RECORDED / "koleo_only")
    assert (diagnosis.verdict, diagnosis.healthy) == ("trivial", False)
    words = in_words(diagnosis)
    assert "dino.loss_weight is 0 and ibot.loss_weight too" in words and "KoLeo alone" in words
    assert "27.8 -> 32.8 %" in words and "too few" not in words


# Failures that were recorded after all rules: what came out, right or not.


def test_of_a_weight_decay_a_hundred_times_too_large_it_says_only_that_it_learns():
    log = read_run_log(RECORDED / "weight_decay")
    assert [value for _, value in log.accuracies["k-NN top-1"]] == [21.2, 28.0, 28.4]
    diagnosis = examine_run(RECORDED / "weight_decay")
    assert (diagnosis.state, diagnosis.verdict, diagnosis.healthy) == ("finished", "learns", True)
    words = in_words(diagnosis)
    assert "0.019 nats" in words and "21.2 -> 28.4 %" in words and "optim.weight_decay" not in words
    unchanged = examine_run(RECORDED / "unchanged")
    assert unchanged.verdict == "learns" and "22.2 -> 34.6 %" in in_words(unchanged)


def test_of_crops_too_small_to_show_anything_it_says_stalled_and_without_health_wrongly_uniform():
    log = read_run_log(RECORDED / "tiny_crops")
    assert [value for _, value in log.accuracies["k-NN top-1"]] == [15.0, 11.2, 10.6]
    diagnosis = diagnose(log)
    assert (diagnosis.state, diagnosis.verdict, diagnosis.healthy) == ("finished", "stalled", False)
    (learning,) = (finding for finding in diagnosis.findings if finding.subject == "learning")
    assert "0.001 nats" in learning.says and learning.remedy.endswith("weaker crops and colours")
    assert diagnose(without_health(log)).verdict == "uniform"


@pytest.mark.parametrize("name", ["collapse", "temperature"])
def test_accuracy_that_rises_in_a_broken_run_does_not_rise_without_koleo(name):
    """The note on accuracy names KoLeo; the verdict does not depend on it."""
    with_koleo, without = examine_run(RECORDED / name), examine_run(RECORDED / f"{name}_no_koleo")
    assert with_koleo.verdict == without.verdict == EXPECTED[name][0]
    assert "rises all the same" in in_words(with_koleo) and "rises all the same" not in in_words(without)
