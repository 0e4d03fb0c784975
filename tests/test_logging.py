"""The logger, the metrics file and the optional TensorBoard."""

import json
import logging
import math
import re
import sys

import numpy as np
import pytest
import torch

from dinov2.engine.metrics import MetricsWriter, read_metrics, tensorboard_tracker
from dinov2.errors import DataError
from dinov2.logging import setup_logging


@pytest.fixture
def name(request):
    name = f"dinov2-test-{request.node.name}"
    yield name
    logger = logging.getLogger(name)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_lines_go_to_the_console_and_to_the_file_of_the_run(name, tmp_path, capsys):
    logger = setup_logging(tmp_path, name=name)
    logger.info("loss %.1f", 1.25)
    logger.warning("odd")
    logger.debug("unseen")
    console = capsys.readouterr()
    assert console.out == ""
    assert re.sub(r"\d\d:\d\d:\d\d", "T", console.err) == "T loss 1.2\nT warning: odd\n"
    lines = (tmp_path / "logs" / "log.txt").read_text().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(rf"I\d{{8}} \d\d:\d\d:\d\d \d+ {re.escape(name)} test_logging.py:\d+\] loss 1.2", lines[0])


def test_the_root_logger_is_left_alone(name, tmp_path):
    before = list(logging.getLogger().handlers)
    setup_logging(tmp_path, name=name)
    assert logging.getLogger().handlers == before
    assert not logging.getLogger(name).propagate


def test_a_second_set_up_replaces_the_first_and_keeps_handlers_of_others(name, tmp_path, capsys):
    foreign = logging.NullHandler()
    logging.getLogger(name).addHandler(foreign)
    setup_logging(tmp_path / "a", name=name)
    logger = setup_logging(tmp_path / "b", name=name)
    logger.info("once")
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "a" / "logs" / "log.txt").read_text() == ""
    assert foreign in logger.handlers


def test_an_output_that_ends_like_a_file_is_the_file(name, tmp_path):
    setup_logging(tmp_path / "mine.log", name=name).info("here")
    assert "here" in (tmp_path / "mine.log").read_text()


def test_other_processes_keep_quiet_and_write_a_file_of_their_own(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dinov2.logging.is_main_process", lambda: False)
    monkeypatch.setattr("dinov2.logging.get_global_rank", lambda: 2)
    setup_logging(tmp_path, name=name).warning("second")
    assert capsys.readouterr().err == ""
    assert "second" in (tmp_path / "logs" / "log.txt.rank2").read_text()
    setup_logging(name=name).warning("nowhere")
    assert capsys.readouterr().err == ""


def test_rows_are_readable_as_soon_as_they_are_written(tmp_path):
    path = tmp_path / "run" / "training_metrics.json"
    with MetricsWriter(path) as metrics:
        metrics.write({"iteration": 0, "total_loss": torch.tensor(1.5), "lr": np.float64(0.1), "note": "x"})
        assert read_metrics(path) == [{"iteration": 0, "total_loss": 1.5, "lr": 0.1, "note": "x"}]
        metrics.write({"iteration": 10})
        assert [row["iteration"] for row in read_metrics(path)] == [0, 10]


def test_what_is_not_finite_is_written_as_null(tmp_path):
    with MetricsWriter(tmp_path / "m.json") as metrics:
        metrics.write({"iteration": 0, "a": math.nan, "b": -math.inf, "c": torch.tensor(math.inf)})
    row = json.loads(
        (tmp_path / "m.json").read_text(), parse_constant=lambda word: pytest.fail(f"invalid JSON: {word}")
    )
    assert row == {"iteration": 0, "a": None, "b": None, "c": None}


def test_a_half_written_last_line_is_ignored_and_then_replaced(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"iteration": 0}\n{"itera')
    assert read_metrics(path) == [{"iteration": 0}]
    with MetricsWriter(path) as metrics:
        metrics.write({"iteration": 10})
    assert read_metrics(path) == [{"iteration": 0}, {"iteration": 10}]


def test_a_broken_line_in_the_middle_and_a_missing_file_are_data_errors(tmp_path):
    (tmp_path / "m.json").write_text('{"iteration": 0}\n???\n{"iteration": 1}\n')
    with pytest.raises(DataError, match="line 2 of"):
        read_metrics(tmp_path / "m.json")
    with pytest.raises(DataError, match="cannot be read"):
        read_metrics(tmp_path / "none.json")


def test_cutting_back_drops_rows_from_an_iteration_on_and_writing_goes_on(tmp_path):
    path = tmp_path / "m.json"
    with MetricsWriter(path) as metrics:
        for iteration in (0, 10, 20, 30):
            metrics.write({"iteration": iteration})
        metrics.cut_back(20)
        assert [row["iteration"] for row in read_metrics(path)] == [0, 10]
        metrics.write({"iteration": 20, "again": True})
    assert read_metrics(path)[-1] == {"iteration": 20, "again": True}
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]


def test_without_tensorboard_there_is_no_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert tensorboard_tracker(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_numbers_of_a_row(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = tensorboard_tracker(tmp_path)
    assert tracker is not None
    tracker.write({"iteration": 10, "total_loss": torch.tensor(2.5), "note": "text", "gone": math.nan})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["total_loss"]
    assert [(event.step, event.value) for event in events.Scalars("total_loss")] == [(10, 2.5)]
