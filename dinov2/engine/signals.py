"""Stopping politely: signals that ask a training to end set a flag, and the loop finishes its step and saves."""

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]


class StopRequest:
    """While entered, SIGTERM and SIGINT (and Ctrl-Break on Windows) set this flag instead of ending the process.

    `if stop:` asks; `stop.reason` names the signal. A second SIGINT raises KeyboardInterrupt at once, for users who do
    not want to wait. The former handlers come back on exit. Outside the main thread Python forbids handlers, so there
    only `request` sets the flag.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._interrupts = 0
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT", "SIGBREAK"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def __bool__(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Set the flag without a signal; the first reason stays."""
        self.reason = self.reason or reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)
