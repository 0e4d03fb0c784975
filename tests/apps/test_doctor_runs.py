"""The doctor on single signs of a run's log, on its life and end, and on its folder."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dinov2.apps.doctor import diagnose, examine_run, in_words
from dinov2.apps.doctor.run_log import read_run_log
from dinov2.errors import DataError
from dinov2.train.train import train
from tests.apps.doctor_logs import LN_K, RECORDED, found, made_log
from tests.train.tiny_run import tiny_config

# Single signs.


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
    waiting = diagnose(made_log(data_time=0.06))
    assert waiting.verdict == "data_bound" and "60% of the time" in in_words(waiting)
    noted = made_log(data_time=0.03)
    assert diagnose(noted).verdict == "learns" and found(noted, "data")[0].level == "note"


def test_jumps_of_the_learning_rate_and_grown_gradients_are_noted():
    jump = made_log(lr=lambda i: 1e-3 if i == 300 else 1e-4)
    assert "at step 300" in found(jump, "learning rate")[0].says
    grown = made_log(grad_norm_backbone=lambda i: 0.1 if i < 200 else 50.0)
    assert "grown from 0.1 to 50" in found(grown, "gradients")[0].says


def test_a_run_without_a_readable_configuration_is_described_as_far_as_it_goes():
    diagnosis = diagnose(replace(made_log(data_time=0.06), cfg=None))
    assert diagnosis.verdict == "data_bound"


# How it lives or ended.


@pytest.mark.parametrize(
    "changes, state",
    [
        ({"silent_for": 5.0}, "running"),
        ({"silent_for": 5.0, "locked": True}, "running"),
        ({"silent_for": 5.0, "locked": False, "checkpoints": [150, 396]}, "stopped"),
        ({"silent_for": 5.0, "locked": False, "checkpoints": [150, 396], "process": 4321}, "stopped"),
        ({"silent_for": 5.0, "locked": False, "checkpoints": [150, 300]}, "killed"),
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


def test_a_run_that_goes_on_was_stopped_or_was_killed_is_known_by_its_lock(tmp_path):
    states = []
    train(
        tiny_config(),
        tmp_path,
        max_steps=8,
        evaluate=lambda training, step: states.append(examine_run(tmp_path).state),
        announce=lambda text: None,
    )
    assert states == ["running"]
    assert examine_run(tmp_path).state == "stopped"
    with open(tmp_path / "training_metrics.json", "ab") as file:
        file.write(json.dumps({"iteration": 9, "total_loss": 1.0}).encode() + b"\n" + b'{"iterat')
    assert examine_run(tmp_path).state == "killed"


def test_a_run_without_locks_is_judged_by_the_time_of_its_files(tmp_path):
    """A folder of the release: checkpoints of another name, no lock."""
    (tmp_path / "training_metrics.json").write_text('{"iteration": 3, "total_loss": 1.0}\n')
    (tmp_path / "model_0000005.rank_0.pth").touch()
    assert examine_run(tmp_path).state == "running"
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert examine_run(tmp_path).state == "stopped"


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
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        paused = diagnose(read_run_log(tmp_path, now=log.stat().st_mtime + 3600))
        assert paused.state == "paused" and f"kill -CONT {process.pid}" in in_words(paused)
        os.kill(process.pid, signal.SIGCONT)
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
    with pytest.raises(DataError, match="is no folder"):
        examine_run(tmp_path / "training_metrics.json")


def written(folder, *lines):
    (folder / "training_metrics.json").write_text("\n".join(lines))
    return folder


def test_a_log_that_was_cut_in_the_middle_of_a_line_is_read_up_to_there(tmp_path):
    whole = (RECORDED / "healthy" / "training_metrics.json").read_text()
    (tmp_path / "config.yaml").write_bytes((RECORDED / "healthy" / "config.yaml").read_bytes())
    written(tmp_path, whole[: len(whole) * 3 // 4])
    log = read_run_log(tmp_path)
    assert len(log.rows) == whole[: len(whole) * 3 // 4].count("\n") and diagnose(log).verdict == "learns"
    assert read_run_log(written(tmp_path, '{"iterat')).rows == []


def test_a_broken_configuration_is_said_and_the_log_is_judged_all_the_same(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {batch_size_per_gpu: many}\n")
    written(tmp_path, (RECORDED / "data_bound" / "training_metrics.json").read_text())
    diagnosis = examine_run(tmp_path)
    assert diagnosis.verdict == "data_bound" and "batch_size_per_gpu" in found_in(diagnosis, "configuration").says


def found_in(diagnosis, subject):
    (finding,) = (finding for finding in diagnosis.findings if finding.subject == subject)
    return finding


def released_rows(first, last, **changes):
    """As the release writes them: every tenth step, no health, NaN as it is."""
    row = {
        "iter_time": 0.5,
        "data_time": 0.01,
        "lr": 1e-3,
        "mom": 0.992,
        "last_layer_lr": 1e-3,
        "current_batch_size": 64,
    }
    row |= {"total_loss": 9.0, "dino_local_crops_loss": 6.0, "dino_global_crops_loss": 1.5, "ibot_loss": 1.0, **changes}
    return [json.dumps({"iteration": i, **row}) for i in range(first, last, 10)]


def test_a_run_of_the_release_is_read_with_its_checkpoints_and_what_it_wrote_twice(tmp_path):
    """It names checkpoints by their last step, appends after a resume without dropping rows, and knows NaN."""
    (tmp_path / "config.yaml").write_text(
        "train: {OFFICIAL_EPOCH_LENGTH: 100}\noptim: {epochs: 10, warmup_epochs: 1}\n"
    )
    (tmp_path / "model_0000249.rank_0.pth").touch()
    (tmp_path / "model_final.rank_0.pth").touch()
    written(tmp_path, *released_rows(0, 400), *released_rows(250, 300), "")
    log = read_run_log(tmp_path, now=(tmp_path / "config.yaml").stat().st_mtime + 9e5)
    assert log.checkpoints == [250] and [i for i, _ in log.series("lr")] == [*range(0, 250, 10), *range(250, 300, 10)]
    diagnosis = diagnose(log)
    assert (diagnosis.state, diagnosis.verdict) == ("killed", "learns")
    assert "goes on from step 250 and repeats 41 steps" in in_words(diagnosis)
    written(tmp_path, *released_rows(0, 400), *released_rows(400, 500, total_loss=math.nan), "")
    assert examine_run(tmp_path).verdict == "diverged"


def test_baselines_are_read_where_a_summary_has_them(tmp_path):
    written(tmp_path, *released_rows(0, 20), "")
    (tmp_path / "summary.json").write_text('{"raw_pixels": 29.6, "untrained": 21, "environment": {}}')
    assert read_run_log(tmp_path).baselines == {"raw_pixels": 29.6, "untrained": 21.0}
    (tmp_path / "summary.json").write_text("[")
    assert read_run_log(tmp_path).baselines == {}
