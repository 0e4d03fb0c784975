"""The command line as a whole: what it answers, what it refuses, and how it ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.apps import report
from dinov2.cli import build_parser, main

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ((), ("train",), ("eval",), ("eval", "knn"), ("quickstart",), ("report",))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_names_the_command_its_options_and_an_example(dinov2, words):
    ended = dinov2(*words, "--help")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.startswith(f"usage: {' '.join(('dinov2', *words))} ")
    assert re.search(r"^example:\s+dinov2 ", ended.out, re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_example_in_the_help_is_a_command_line_that_parses(dinov2, words):
    example = dinov2(*words, "--help").out.rpartition("example:")[2].split()
    assert example[: len(words) + 1] == ["dinov2", *words]
    assert build_parser().parse_args(example[1:]).run


@pytest.mark.parametrize(
    "words, complaint",
    [
        ((), "the following arguments are required: COMMAND"),
        (("trian",), "invalid choice: 'trian'"),
        (("eval",), "the following arguments are required: TASK"),
        (("eval", "knnn"), "invalid choice: 'knnn'"),
        (("train", "--ouput-dir", "x"), "dinov2 train: error: unrecognized arguments: --ouput-dir; is it --output-dir"),
        (("train", "--zzz"), "unrecognized arguments: --zzz"),
        (("train", "--max-steps", "0"), "argument --max-steps: '0' is no whole number from 1"),
        (("train", "--max-steps", "-3"), "argument --max-steps: '-3' is no whole number from 1"),
        (("train", "--max-steps", "many"), "argument --max-steps: 'many' is no whole number from 1"),
        (("quickstart", "--max-steps", "0"), "argument --max-steps: '0' is no whole number from 1"),
        (("report",), "the following arguments are required: RUN"),
        (("eval", "knn", "--train-dataset", "x"), "the following arguments are required: --model"),
        (
            ("eval", "knn", "--model", "a", "--train-dataset", "b", "--val-dataset", "c", "d=e"),
            "dinov2 eval knn: error: unrecognized arguments: d=e",
        ),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_says_why(dinov2, here, words, complaint):
    ended = dinov2(*words)
    assert ended.code == 2 and ended.out == ""
    assert complaint in ended.err.splitlines()[-1]
    assert list(here.iterdir()) == []


def test_an_interrupt_ends_with_130_and_one_line(dinov2, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "report", interrupted)
    ended = dinov2("report", "x")
    assert (ended.code, ended.out, ended.err) == (130, "", "dinov2: interrupted\n")


def test_a_bug_of_ours_is_not_hidden_behind_a_sentence(dinov2, monkeypatch):
    def wrong(*arguments, **options):
        raise IndexError("ours")

    monkeypatch.setattr(report, "report", wrong)
    with pytest.raises(IndexError, match="ours"):
        main(["report", "x"])


# In processes of their own.


def python(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_module_is_the_command():
    ended = python("-m", "dinov2", "--version")
    assert re.fullmatch(r"dinov2-anywhere \d+\.\d+\.\d+\n", ended.stdout) and ended.returncode == 0
    ended = python("-m", "dinov2", "report", "no/such/run")
    assert ended.returncode == 2
    assert ended.stderr == f"dinov2: there is no folder {Path('no/such/run')}; give the folder of a run\n"


def test_help_and_refusals_of_the_parser_do_not_wait_for_torch():
    code = "import dinov2.cli as c\ntry: c.main(['train', '-h'])\nfinally: import sys; print('torch' in sys.modules)"
    assert python("-c", code).stdout.endswith("False\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_reader_that_goes_away_is_no_error_message():
    command = f"{sys.executable} -m dinov2 train --list-presets | true"
    ended = subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_output_that_cannot_be_written_is_said_in_one_line():
    command = f"{sys.executable} -m dinov2 train --list-presets > /dev/full"
    ended = subprocess.run(["sh", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (1, "dinov2: No space left on device\n")
