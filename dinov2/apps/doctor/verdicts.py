"""The words that a run's learning is judged with, in the order in which they count."""

from typing import NamedTuple

from dinov2.apps.doctor.findings import Finding

__all__ = ["VERDICTS", "Judged", "more_serious"]

VERDICTS = {
    "diverged": "losses or gradients are not finite, or large steps have broken the network",
    "frozen": "teacher or student does not move, so that the model which is kept cannot get better",
    "collapsed": "the teacher says the same of every image, or all features are the same",
    "uniform": "the teacher is sure of nothing: every prototype is as likely as every other, for every image",
    "trivial": "no term of the loss asks what an image shows, or pixels alone answer it",
    "starved": "the model waits for data most of the time",
    "hollow": "the loss falls, but accuracy on labelled images does not rise",
    "stalled": "the student does not come to know more about an image than guessing",
    "learns": "the student knows more about an image than guessing",
    "too early": "too few steps to judge",
    "unknown": "the log does not say what is learned",
}
"""Every verdict, the most serious first, and what it means."""


class Judged(NamedTuple):
    """What a rule that decides has found."""

    verdict: str
    finding: Finding


def more_serious(one: str, other: str) -> str:
    """That of two verdicts which stands earlier in `VERDICTS`."""
    return min(one, other, key=list(VERDICTS).index)
