"""`dinov2 doctor`."""

import argparse
import json

import pytest

from dinov2.cli import doctor
from dinov2.run.exits import exit_code_of
from tests.runs import Ended


@pytest.fixture
def ask(here, capsys):
    """The command: words behind `dinov2 doctor` in, exit code and output out."""

    def command(*words):
        parser = argparse.ArgumentParser()
        doctor.add_to(parser.add_subparsers(required=True))
        arguments = parser.parse_args(["doctor", *map(str, words)])
        return Ended(exit_code_of(lambda: arguments.run(arguments)), *capsys.readouterr())

    return command


def test_a_machine_is_described_and_the_exit_code_says_whether_something_needs_doing(ask):
    ended = ask()
    assert ended.code == (1 if "PROBLEM" in ended.out else 0)
    for subject in ("device", "precision", "threads", "loader", "disk", "torch"):
        assert f" {subject}: " in ended.out


def test_a_run_is_described_as_json(ask, run):
    ended = ask(run, "--json")
    told = json.loads(ended.out)
    assert (told["patient"], told["state"], told["verdict"]) == (run.name, "finished", "too early")
    assert ended.code == (0 if told["healthy"] else 1)
    assert {finding["subject"] for finding in told["findings"]} >= {"state", "learning"}


def test_a_folder_without_a_run_is_one_sentence_and_exit_code_two(ask, here):
    for folder, words in ((here, "holds no training"), (here / "nowhere", "is no folder")):
        ended = ask(folder)
        assert ended.code == 2 and words in ended.err and len(ended.err.splitlines()) == 1
