"""How a command ends: exit codes, one sentence, no process that stays behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.errors import (
    ConfigError,
    DataError,
    DinoError,
    MissingDependency,
    TrainingDiverged,
    UnknownRelease,
    WeightsError,
)
from dinov2.run.exits import exit_code_of

REPOSITORY = Path(__file__).resolve().parents[2]


def failing(error: BaseException):
    def command() -> int:
        raise error

    return command


def test_a_command_s_own_code_is_passed_on():
    assert [exit_code_of(lambda: 0), exit_code_of(lambda: 1)] == [0, 1]


@pytest.mark.parametrize("error", [ConfigError, DataError, WeightsError, UnknownRelease])
def test_wrong_input_is_2(error, capsys):
    assert exit_code_of(failing(error("this is wrong; write that"))) == 2
    assert capsys.readouterr().err == "dinov2: this is wrong; write that\n"


def test_a_missing_package_is_2_and_names_the_command_that_installs_it(capsys):
    assert exit_code_of(failing(MissingDependency("scipy", purpose="this"))) == 2
    assert "pip install 'scipy'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DinoError, TrainingDiverged])
def test_work_that_failed_is_1(error, capsys):
    assert exit_code_of(failing(error("it failed"))) == 1
    assert capsys.readouterr().err == "dinov2: it failed\n"


def test_an_interrupt_is_130(capsys):
    assert exit_code_of(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "dinov2: interrupted\n"


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "a/b"), "a/b: Permission denied"),
        (OSError("no number"), "no number"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_the_path(error, line, capsys):
    assert exit_code_of(failing(error)) == 1
    assert capsys.readouterr().err == f"dinov2: {line}\n"


def test_other_errors_are_bugs_and_pass():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_worker_that_leaves_sigterm_to_its_parent_does_not_keep_it_alive(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, signal, sys, time\n"
        "from dinov2.errors import DinoError\n"
        "from dinov2.run.exits import exit_code_of\n"
        "def work(ready):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    ready.set()\n"
        "    time.sleep(100)\n"
        "def command():\n"
        "    context = multiprocessing.get_context('fork')\n"
        "    ready = context.Event()\n"
        "    context.Process(target=work, args=(ready,), daemon=True).start()\n"
        "    ready.wait()\n"
        "    raise DinoError('it failed')\n"
        "sys.exit(exit_code_of(command))\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,  # less than the worker's sleep: the test fails with TimeoutExpired
    )
    assert (ended.returncode, ended.stderr) == (1, "dinov2: it failed\n")
