"""Stopping politely."""

import os
import signal
import threading

import pytest

from dinov2.engine.signals import StopRequest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="os.kill ends a Windows process at once")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_loop_goes_on(number):
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.reason == number.name


def test_a_second_interrupt_ends_at_once():
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_many_terminations_and_one_interrupt_are_still_polite():
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.reason == "SIGTERM"


def test_the_former_handlers_come_back():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    try:
        with StopRequest():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [signal.SIGTERM]


def test_outside_the_main_thread_only_a_request_sets_the_flag():
    reasons = []

    def body():
        with StopRequest() as stop:
            stop.request("told so")
            stop.request("later")
            reasons.append(stop.reason)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert reasons == ["told so"]
