"""Rates, waiting share and time to go, on a clock that the test turns."""

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dinov2.engine import progress as progress_module
from dinov2.engine.progress import Progress, peak_memory


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dinov2")
    return caplog


def plain():
    return Console(file=io.StringIO(), force_terminal=False)


def run(progress, clock, n, *, seconds=0.5, images=8, waiting=0.1):
    for _ in range(n):
        clock.now += seconds
        progress.step(images=images, waiting=waiting)


def test_before_the_first_step_there_are_no_rates_and_nothing_divides_by_zero(clock):
    figures = Progress(10, clock=clock, console=plain()).figures()
    assert figures.iter_time is figures.images_per_second is figures.waiting_share is figures.seconds_to_go is None
    assert str(figures._replace(memory=None)) == ""


def test_steps_that_take_no_time_divide_nothing_by_zero(clock):
    with Progress(10, clock=clock, console=plain()) as progress:
        run(progress, clock, 2, seconds=0.0, waiting=0.0)
        assert progress.figures().images_per_second is None
        assert progress.figures().waiting_share is None


def test_rates_are_means_over_the_last_steps(clock):
    with Progress(100, clock=clock, console=plain()) as progress:
        run(progress, clock, 30, seconds=9.0)  # pushed out of the window by the next 20
        run(progress, clock, 20)
        figures = progress.figures()
    assert figures.step == 50
    assert figures.iter_time == pytest.approx(0.5)
    assert figures.data_time == pytest.approx(0.1)
    assert figures.waiting_share == pytest.approx(0.2)
    assert figures.images_per_second == pytest.approx(16.0)
    assert figures.seconds_to_go == pytest.approx(25.0)


def test_a_resumed_run_estimates_from_its_own_steps(clock):
    with Progress(1000, start=900, clock=clock, console=plain()) as progress:
        run(progress, clock, 10)
        assert progress.figures().step == 910
        assert progress.figures().seconds_to_go == pytest.approx(45.0)


def test_a_pause_belongs_to_no_step(clock):
    with Progress(10, clock=clock, console=plain()) as progress:
        run(progress, clock, 1)
        with progress.paused():
            clock.now += 60.0
        run(progress, clock, 1)
        assert progress.figures().iter_time == pytest.approx(0.5)


def test_without_a_terminal_lines_are_logged_every_few_seconds_and_at_the_end(clock, lines):
    with Progress(100, label="toy", clock=clock, console=plain(), line_every=10.0) as progress:
        for _ in range(50):
            run(progress, clock, 1)
            progress.show(loss=2.0)
    words = [message for message in lines.messages if message.startswith("toy")]
    assert [word.split(":")[0] for word in words] == ["toy 1/100", "toy 21/100", "toy 41/100", "toy 50/100"]
    assert "loss 2.0000, 16 images/s, waiting for data 20%" in words[-1]
    assert "0:00:25 to go" in words[-1]


def test_on_a_terminal_one_live_line_shows_the_figures(clock):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    with Progress(4, label="toy", clock=clock, console=console) as progress:
        run(progress, clock, 4)
        progress.show(loss=1.5)
    assert "4/4" in screen.getvalue()
    assert "loss 1.5000" in screen.getvalue()


def test_processes_other_than_the_main_one_show_nothing(clock, lines, monkeypatch):
    monkeypatch.setattr(progress_module, "is_main_process", lambda: False)
    screen = io.StringIO()
    with Progress(4, clock=clock, console=Console(file=screen, force_terminal=True)) as progress:
        run(progress, clock, 4)
        progress.show(loss=1.5)
    assert screen.getvalue() == ""
    assert lines.messages == []


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def rates(clock, *, device=None, slow=2.6, waiting=0.1):
    """30 steps of half a second, 30 that are `slow`, with a display at every tenth, and both again."""
    with Progress(120, clock=clock, console=plain(), device=device) as progress:
        for seconds in (0.5, slow, 0.5, slow):
            for _ in range(3):
                run(progress, clock, 10, seconds=seconds, waiting=0.1 if seconds == 0.5 else waiting)
                progress.show(loss=1.0)


def warnings(lines):
    return [record.getMessage() for record in lines.records if record.levelname == "WARNING"]


def test_threads_that_wait_for_each_other_are_noticed_once_with_what_helps(clock, lines, threads):
    threads(2)
    rates(clock)
    (words,) = warnings(lines)
    assert words.startswith("steps take 6 times as long as earlier in this run")
    assert "2 threads" in words and "train.num_threads=1" in words


@pytest.mark.parametrize(
    "options",
    [{"slow": 2.0}, {"slow": 9.0, "waiting": 8.6}, {"device": torch.device("cuda")}],
    ids=["a little slower", "waiting for data", "on a GPU"],
)
def test_other_slowness_is_no_matter_of_threads(clock, lines, threads, options, monkeypatch):
    threads(2)
    monkeypatch.setattr(progress_module, "peak_memory", lambda device: None)
    rates(clock, **options)
    assert warnings(lines) == []


def test_steps_that_are_slow_from_the_start_are_noticed_too(clock, lines, threads):
    threads(2)
    asked = []
    with Progress(120, clock=clock, console=plain(), one_thread_gain=lambda: asked.append(1) or 7.0) as progress:
        for _ in range(6):
            run(progress, clock, 10, seconds=3.0)
            progress.show(loss=1.0)
    (words,) = warnings(lines)
    assert words.startswith("one thread would be 7.0 times as fast: another program seems to need the same cores")
    assert asked == [1]


def test_after_the_first_steps_the_duration_is_told_once(clock, lines):
    with Progress(1000, clock=clock, console=plain()) as progress:
        run(progress, clock, 1, seconds=30.0)
        progress.show(loss=1.0)
        for _ in range(3):
            run(progress, clock, 10, seconds=0.5)
            progress.show(loss=1.0)
    told = [text for text in lines.messages if text.startswith("the first steps took 0.5 s each")]
    (words,) = told
    assert "about 0:08:14 for the 989 that are left, evaluations and checkpoints not counted" in words


def test_one_thread_waits_for_none(clock, lines, threads):
    threads(1)
    rates(clock)
    assert warnings(lines) == []


def test_memory_is_plausible():
    assert 2**25 < peak_memory() < 2**40


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what other systems count includes the parent")
def test_memory_is_that_of_this_process_and_not_of_the_one_that_began_it():
    held = torch.ones(2**28)  # 1 GiB
    code = "from dinov2.engine.progress import peak_memory; print(peak_memory())"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(output) < held.numel() * held.element_size() < peak_memory()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00:00"), (61, "0:01:01"), (36_000, "10:00:00"), (90_061, "1 d 01:01:01")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert progress_module._duration(seconds) == text
