"""Findings of the doctor: one sentence about one thing, what to do about it, and the numbers behind it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

__all__ = ["Diagnosis", "Finding", "counted", "fine", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["fine", "note", "problem"]
    """`problem` needs something done, `note` is worth knowing, `fine` was looked at and is as it should be."""
    subject: str
    """Subject of the check, in a word or two; the same for the same check every time."""
    says: str
    """One sentence."""
    remedy: str = ""
    """Remedy: a command to type, or keys to change; empty where nothing needs doing."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """The numbers that the sentence rests on."""


@dataclass(frozen=True)
class Diagnosis:
    """All findings about a machine or a run."""

    patient: str
    """`machine`, or the name of a run's folder."""
    verdict: str
    """One or two words; for a run those of `VERDICTS`, for a machine `fit` or `unfit`."""
    findings: Sequence[Finding]
    state: str = ""
    """Of a run: `running`, `finished`, `stopped`, `killed`, ..."""

    @property
    def healthy(self) -> bool:
        """Whether nothing needs doing."""
        return not any(finding.level == "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "patient": self.patient,
            "verdict": self.verdict,
            "state": self.state,
            "healthy": self.healthy,
            "findings": [_plain(asdict(finding)) for finding in self.findings],
        }


def fine(subject: str, says: str, **facts: object) -> Finding:
    """Looked at and as it should be."""
    return Finding("fine", subject, says, facts=facts)


def note(subject: str, says: str, remedy: str = "", **facts: object) -> Finding:
    """Worth knowing."""
    return Finding("note", subject, says, remedy, facts)


def problem(subject: str, says: str, remedy: str, **facts: object) -> Finding:
    """Needs something done."""
    return Finding("problem", subject, says, remedy, facts)


def counted(n: int, noun: str, plural: str = "s") -> str:
    """`1 core`, `2 cores`."""
    return f"{n} {noun}{plural if n != 1 else ''}"


def _plain(value: object) -> object:
    """The value with null for what JSON cannot say: a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
