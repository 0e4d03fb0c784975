"""Curves of health and of evaluations in a run's report."""

import json

from dinov2.report.run_record import RunRecord, read_run
from dinov2.report.training import training_report


def test_every_measure_of_the_log_has_a_curve():
    keys = "teacher_entropy marginal_entropy prototype_usage kl_to_uniform rank rank_me patch_rank koleo_distance"
    keys += " spread near_similarity far_similarity high_norm_share"
    metrics = {f"health_{key}": [(0.0, 0.25), (100.0, 0.5)] for key in keys.split()}
    page = training_report(
        RunRecord(name="run", metrics={**metrics, "health_rank_bound": [(0.0, 64.0), (100.0, 64.0)]})
    )
    for title in ("class tokens (nats)", "Prototypes in use", "Effective rank", "on the sphere", "of high norm"):
        assert title in page
    assert "patches (nats)" not in page  # this run has no iBOT term
    assert "most that a batch" in page


def test_a_run_without_health_says_so():
    assert "not measured" in training_report(RunRecord(name="run", metrics={"loss": [(0.0, 1.0)]}))


def test_evaluations_are_read_by_name_and_drawn(tmp_path):
    row = {"iteration": 99, "task": "knn", "metric": "top-1", "value": 40.0, "setting": "k=20"}
    rows = [row, {**row, "iteration": 199, "value": 50.0}, {**row, "task": "logistic", "setting": "C=1", "value": None}]
    file = tmp_path / "evaluation_metrics.json"
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    run = read_run(tmp_path)
    assert run.evaluations == {"k-NN top-1 (k=20)": [(99.0, 40.0), (199.0, 50.0)]}
    page = training_report(run)
    assert "Accuracy of the teacher, by evaluation" in page and "k-NN top-1 (k=20)" in page
    assert "by evaluation" not in training_report(RunRecord(name="run"))
