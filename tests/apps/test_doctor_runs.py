"""The doctor's verdict on runs that were really trained (tests/apps/recorded_runs), and on single signs."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dinov2.apps.doctor import VERDICTS, diagnose, examine_run, in_words
from dinov2.apps.doctor.run_log import RunLog, read_run_log
from dinov2.errors import DataError
from dinov2.train.train import train
from tests.train.tiny_run import tiny_config

RECORDED = Path(__file__).parent / "recorded_runs"

K = 32
LN_K = math.log(K)


# Runs that were trained, four of them made to fail.

EXPECTED = {
    "healthy": ("learns", ""),
    "collapse": ("collapsed", "sinkhorn_knopp"),
    "learning_rate": ("diverged", "optim.base_lr"),
    "temperature": ("uniform", "teacher.teacher_temp=0.04"),
    "starved": ("starved", "train.cache_dataset=true"),
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
    log = read_run_log(RECORDED / name)
    rows = [{k: v for k, v in row.items() if not k.startswith(("health_", "grad_norm_"))} for row in log.rows]
    verdict = diagnose(replace(log, rows=rows)).verdict
    assert verdict == EXPECTED[name][0]


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


@pytest.mark.parametrize("name", ["collapse", "starved"])
def test_what_is_plain_is_said_early(name):
    log = read_run_log(RECORDED / name)
    assert diagnose(replace(log, rows=log.rows[: len(log.rows) // 2], accuracies={})).verdict == EXPECTED[name][0]


# Failures that were recorded after the rules were frozen: what the doctor says of them, whether it is right or not.


def test_of_a_teacher_that_never_moves_it_says_stalled_but_not_why():
    log = read_run_log(RECORDED / "still_teacher")
    assert {row["mom"] for row in log.rows} == {1.0}
    assert [value for _, value in log.accuracies["k-NN top-1"]] == [20.4, 20.4, 20.4]
    diagnosis = examine_run(RECORDED / "still_teacher")
    assert (diagnosis.state, diagnosis.verdict, diagnosis.healthy) == ("finished", "stalled", False)
    words = in_words(diagnosis)
    assert "0.002 nats" in words and "k-NN top-1 20.4 -> 20.4 %" in words
    assert "momentum" not in words


def test_of_a_teacher_that_never_moves_it_wrongly_says_uniform_without_health():
    log = read_run_log(RECORDED / "still_teacher")
    rows = [{k: v for k, v in row.items() if not k.startswith(("health_", "grad_norm_"))} for row in log.rows]
    assert diagnose(replace(log, rows=rows)).verdict == "uniform"
    assert min(row["health_marginal_entropy"] - row["health_teacher_entropy"] for row in log.rows) > 0.08


def test_of_a_training_on_one_view_it_wrongly_says_that_it_learns():
    log = read_run_log(RECORDED / "one_view")
    assert (log.cfg.crops.global_crops_scale, log.cfg.crops.local_crops_number) == ((1.0, 1.0), 0)
    assert [value for _, value in log.accuracies["k-NN top-1"]] == [18.6, 19.4, 19.2]  # 20.4 % before training
    diagnosis = examine_run(RECORDED / "one_view")
    assert (diagnosis.state, diagnosis.verdict, diagnosis.healthy) == ("finished", "learns", True)
    words = in_words(diagnosis)
    assert "1.588 nats" in words and "k-NN top-1 18.6 -> 19.2 %" in words
    assert all(finding.level == "fine" for finding in diagnosis.findings)


def test_of_a_training_with_koleo_alone_it_wrongly_says_that_it_is_too_early():
    diagnosis = examine_run(RECORDED / "koleo_only")
    assert (diagnosis.state, diagnosis.verdict) == ("finished", "too early")
    assert "300 steps are too few" in in_words(diagnosis)


@pytest.mark.parametrize("name", ["collapse", "temperature"])
def test_accuracy_that_rises_in_a_broken_run_does_not_rise_without_koleo(name):
    """The note on accuracy names KoLeo; the verdict does not depend on it."""
    with_koleo, without = examine_run(RECORDED / name), examine_run(RECORDED / f"{name}_no_koleo")
    assert with_koleo.verdict == without.verdict == EXPECTED[name][0]
    assert "rises all the same" in in_words(with_koleo) and "rises all the same" not in in_words(without)


# Single signs.


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


def test_a_loss_at_ln_k_is_a_uniform_teacher():
    log = made_log(dino_local_crops_loss=LN_K * 2 / 3, dino_global_crops_loss=LN_K / 3, teacher_temp=0.2)
    diagnosis = diagnose(log)
    assert diagnosis.verdict == "uniform"
    assert "ln K (3.466)" in in_words(diagnosis) and "the teacher's temperature is 0.2" in in_words(diagnosis)


def test_a_loss_near_zero_is_a_constant_teacher():
    diagnosis = diagnose(made_log(dino_local_crops_loss=0.02, dino_global_crops_loss=0.01))
    assert diagnosis.verdict == "collapsed" and "every image the same assignment" in in_words(diagnosis)


@pytest.mark.parametrize("value", [None, 0.1 * 17.5], ids=["written as null", "finite with our epsilon"])
def test_an_infinite_koleo_term_means_duplicates(value):
    diagnosis = diagnose(made_log(koleo_loss=value, overrides=("dino.koleo_loss_weight=0.1",)))
    assert diagnosis.verdict == "collapsed" and "duplicates" in in_words(diagnosis)


def test_the_patches_are_judged_where_there_is_no_dino_term():
    def log(level):
        made = made_log(ibot_loss=level / 2)
        rows = [{k: v for k, v in row.items() if "crops_loss" not in k} for row in made.rows]
        return replace(made, rows=rows)

    assert "the iBOT term sits at 3.466" in in_words(diagnose(log(LN_K)))
    assert diagnose(log(0.8 * LN_K)).verdict == "learns"


def test_more_than_one_row_that_is_not_finite_has_diverged():
    log = made_log(total_loss=lambda i: None if i > 350 else 3.0)
    assert diagnose(log).verdict == "diverged"


def test_a_run_that_gave_up_has_diverged():
    log = replace(made_log(20), skipped=[*range(186, 191), *range(191, 196)])
    diagnosis = diagnose(log)
    assert (diagnosis.state, diagnosis.verdict) == ("gave up", "diverged")
    assert "skipped_steps.json" in in_words(diagnosis)


def test_a_loss_that_no_longer_falls_and_knows_nothing_has_stalled():
    level = LN_K - 0.005
    log = made_log(
        dino_local_crops_loss=level,
        dino_global_crops_loss=0.0,
        health_teacher_entropy=1.5,
        health_marginal_entropy=LN_K,
        lr=1e-6,
        overrides=("optim.base_lr=1e-6",),
    )
    assert diagnose(log).verdict == "stalled"
    assert "a higher optim.base_lr" in found(log, "learning")[0].remedy


def test_a_batch_too_small_for_the_prototypes_is_not_taken_for_collapse():
    """64 crops that are all told apart use 64 of 65,536 prototypes at most: their mean has the entropy ln 128 then."""
    log = made_log(
        overrides=("dino.head_n_prototypes=65536",),
        dino_local_crops_loss=6.0,
        dino_global_crops_loss=2.0,
        health_teacher_entropy=0.01,
        health_marginal_entropy=math.log(128),
    )
    assert diagnose(log).verdict == "learns"


def test_accuracy_that_rises_is_learning_whatever_the_loss_says():
    log = made_log(dino_local_crops_loss=LN_K - 0.01, dino_global_crops_loss=0.0)
    assert diagnose(log).verdict == "stalled"
    assert diagnose(replace(log, accuracies={"k-NN top-1": [(99, 20.0), (199, 30.0)]})).verdict == "learns"


def test_waiting_for_data_is_named_with_its_share():
    starved = diagnose(made_log(data_time=0.06))
    assert starved.verdict == "starved" and "60% of the time" in in_words(starved)
    noted = made_log(data_time=0.03)
    assert diagnose(noted).verdict == "learns" and found(noted, "data")[0].level == "note"


def test_jumps_of_the_learning_rate_and_grown_gradients_are_noted():
    jump = made_log(lr=lambda i: 1e-3 if i == 300 else 1e-4)
    assert "at step 300" in found(jump, "learning rate")[0].says
    grown = made_log(grad_norm_backbone=lambda i: 0.1 if i < 200 else 50.0)
    assert "grown from 0.1 to 50" in found(grown, "gradients")[0].says


def test_a_run_without_a_readable_configuration_is_described_as_far_as_it_goes():
    diagnosis = diagnose(replace(made_log(data_time=0.06), cfg=None))
    assert diagnosis.verdict == "starved"


# How it lives or ended.


@pytest.mark.parametrize(
    "changes, state",
    [
        ({"silent_for": 5.0}, "running"),
        ({"silent_for": 900.0, "process": 4321}, "silent"),
        ({"silent_for": 900.0, "checkpoints": [150, 396]}, "stopped"),
        ({"silent_for": 900.0, "checkpoints": [150, 300]}, "killed"),
        ({"silent_for": 900.0}, "killed"),
        ({"silent_for": None}, "killed"),
        ({"silent_for": 900.0, "checkpoints": [1000]}, "finished"),
    ],
)
def test_the_state_of_a_run(changes, state):
    diagnosis = diagnose(replace(made_log(), **changes))
    assert diagnosis.state == state
    if state == "killed":
        saved = max(changes.get("checkpoints", [0]))
        assert f"repeats {391 - saved} steps" in in_words(diagnosis)


def test_a_long_silence_is_normal_for_slow_steps():
    assert diagnose(replace(made_log(iter_time=60.0), silent_for=900.0)).state == "running"


# Reading the folder.


def test_a_run_that_was_killed_and_one_that_goes_on_are_told_apart_by_the_time_of_their_files(tmp_path):
    train(tiny_config(), tmp_path, max_steps=8, announce=lambda text: None)
    assert examine_run(tmp_path).state == "running"
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert examine_run(tmp_path).state == "stopped"
    with open(tmp_path / "training_metrics.json", "ab") as file:
        file.write(json.dumps({"iteration": 9, "total_loss": 1.0}).encode() + b"\n" + b'{"iterat')
    os.utime(tmp_path / "training_metrics.json", (1e9, 1e9))
    assert examine_run(tmp_path).state == "killed"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the system does not tell which files a process holds")
def test_a_process_that_is_silent_is_known_by_the_log_that_it_holds_open(tmp_path):
    (tmp_path / "config.yaml").write_text("train:\n  seed: 1\n")
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "log.txt"
    code = "import sys; file = open(sys.argv[1], 'a'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"open\n"
        log.write_text(f"I20250814 12:03:41 {process.pid} dinov2 train.py:1] begun\n")
        read = read_run_log(tmp_path, now=log.stat().st_mtime + 3600)
        assert read.process == process.pid and diagnose(read).state == "silent"
        process.communicate()
    assert read_run_log(tmp_path).process is None


def test_a_folder_that_holds_only_a_configuration_has_not_begun(tmp_path):
    (tmp_path / "config.yaml").write_text("train:\n  seed: 1\n")
    diagnosis = examine_run(tmp_path)
    assert (diagnosis.state, diagnosis.verdict) == ("running", "too early")


def test_folders_without_a_training_and_broken_logs_are_one_sentence(tmp_path):
    with pytest.raises(DataError, match="holds no training"):
        examine_run(tmp_path)
    with pytest.raises(DataError, match="is no folder"):
        examine_run(tmp_path / "absent")
    (tmp_path / "training_metrics.json").write_text("nonsense\n{}\n")
    with pytest.raises(DataError, match="line 1"):
        examine_run(tmp_path)
