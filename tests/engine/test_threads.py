"""One thread against all: measured in turn, the faster taken, the former number put back."""

import logging

import pytest
import torch

from dinov2.engine import threads as threads_module
from dinov2.engine.threads import fastest_threads, one_thread_gain, sample_of

CPU = torch.device("cpu")


class Machine:
    """A clock and a number of threads that need no processor: `work` takes as long as the test says."""

    def __init__(self, monkeypatch, *, several, seconds):
        self.now, self.threads, self.seconds, self.calls = 0.0, several, seconds, []
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(self, "threads", number))
        monkeypatch.setattr(threads_module.time, "perf_counter", lambda: self.now)

    def work(self):
        self.calls.append(self.threads)
        self.now += self.seconds[self.threads]


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dinov2"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dinov2")
    return caplog


def test_one_thread_is_taken_where_several_wait_for_each_other(monkeypatch, said):
    machine = Machine(monkeypatch, several=2, seconds={1: 0.1, 2: 1.0})
    with fastest_threads(machine.work, device=CPU):
        assert machine.threads == 1
    assert machine.threads == 2
    assert machine.calls == [2, 1, 2, 1, 2, 1, 2]
    assert "computing with 1 of 2 threads: measured just now, 10.0 times as fast as 2; --threads overrules" in said.text


def test_all_are_taken_where_they_are_faster(monkeypatch, said):
    machine = Machine(monkeypatch, several=8, seconds={1: 1.0, 8: 0.2})
    with fastest_threads(machine.work, device=CPU):
        assert machine.threads == 8
    assert "computing with 8 of 8 threads: measured just now, 5.0 times as fast as one" in said.text


def test_a_given_number_is_taken_and_warned_of_where_it_is_slow_from_the_start(monkeypatch, said):
    machine = Machine(monkeypatch, several=8, seconds={1: 0.1, 2: 1.0})
    with fastest_threads(machine.work, device=CPU, threads=2):
        assert machine.threads == 2
    assert machine.threads == 8
    assert "one thread is 10.0 times as fast as the 2 that were asked for" in said.text


@pytest.mark.parametrize("several, device", [(1, "cpu"), (8, "cuda")])
def test_nothing_is_measured_where_there_is_no_choice(monkeypatch, several, device):
    machine = Machine(monkeypatch, several=several, seconds={})
    assert one_thread_gain(machine.work, torch.device(device)) == 0
    with fastest_threads(machine.work, device=torch.device(device)):
        assert machine.threads == several
    assert machine.calls == []


def test_the_former_number_comes_back_after_an_error(monkeypatch):
    machine = Machine(monkeypatch, several=2, seconds={1: 0.1, 2: 1.0})
    with pytest.raises(ValueError, match="inside"), fastest_threads(machine.work, device=CPU):
        raise ValueError("inside")
    assert machine.threads == 2


def test_a_sample_is_smaller_for_larger_models():
    small, large = torch.nn.Linear(100, 100), torch.nn.Linear(10_000, 10_000)
    assert sample_of(small, channels=3, side=28, patch_size=14).shape == (32, 3, 28, 28)
    assert sample_of(large, channels=4, side=28, patch_size=14).shape == (9, 4, 28, 28)
