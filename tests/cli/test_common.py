"""What commands share."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.conftest import REPOSITORY

RESULTS_BESIDE_A_BAR = """
from dinov2.cli.common import ExtractionProgress, say
with ExtractionProgress() as progress:
    show = progress("working")
    show(1, 2)
    say("a result")
"""


def test_results_that_are_piped_on_are_whole_while_a_bar_is_on_the_terminal() -> None:
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", RESULTS_BESIDE_A_BAR]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=end, env=environment) as process:
        os.close(end)
        shown = b""
        with suppress(OSError):  # how a terminal says that nobody writes to it any more
            while block := os.read(terminal, 4096):
                shown += block
        results = process.stdout.read() if process.stdout else b""
    os.close(terminal)
    assert (process.returncode, results) == (0, b"a result\n")
    assert b"working" in shown and b"a result" not in shown
