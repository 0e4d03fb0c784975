"""`dinov2 doctor`: is this machine ready, and does that run learn? Findings in words, each with what to do."""

import os
from collections.abc import Iterable

from dinov2.apps.doctor.findings import Diagnosis, Finding, counted, note
from dinov2.apps.doctor.lifecycle import examine_life
from dinov2.apps.doctor.machine import examine_machine
from dinov2.apps.doctor.packages import examine_packages
from dinov2.apps.doctor.rules import examine_learning
from dinov2.apps.doctor.run_log import RunLog, read_run_log
from dinov2.apps.doctor.signs import signs_of
from dinov2.apps.doctor.task import examine_task
from dinov2.apps.doctor.verdicts import VERDICTS

__all__ = ["VERDICTS", "Diagnosis", "Finding", "diagnose", "examine", "examine_run", "in_words"]

_MARKS = {"fine": "ok", "note": "note", "problem": "PROBLEM"}


def examine() -> Diagnosis:
    """This machine: devices, precision, threads, loader, memory, disk, packages."""
    findings = [*examine_machine(), *examine_packages()]
    fit = not any(finding.level == "problem" for finding in findings)
    return Diagnosis("machine", "fit" if fit else "unfit", findings)


def examine_run(folder: str | os.PathLike[str]) -> Diagnosis:
    """A run, dead or alive, from the files in its folder.

    Raises `DataError` when the folder holds no training, or a log that cannot be read.
    """
    return diagnose(read_run_log(folder))


def diagnose(log: RunLog) -> Diagnosis:
    """The diagnosis of what was read from a run's folder."""
    signs = signs_of(log)
    state, life = examine_life(log, signs)
    verdict, findings = examine_task(log, signs, *examine_learning(log, signs))
    if log.unusable:
        says = f"the configuration cannot be read, and what needs it was left out ({log.unusable})"
        findings = [*findings, note("configuration", says, "mend config.yaml, or put the original in its place")]
    return Diagnosis(log.name, verdict, [life, *findings], state=state)


def in_words(diagnosis: Diagnosis) -> str:
    """The diagnosis for people: the verdict, then a line a finding, with what to do below."""
    if diagnosis.patient == "machine":
        problems = sum(finding.level == "problem" for finding in diagnosis.findings)
        head = "this machine is ready" if not problems else f"this machine has {counted(problems, 'problem')}"
    else:
        head = f"{diagnosis.patient}: {diagnosis.verdict} ({VERDICTS[diagnosis.verdict]}), {diagnosis.state}"
    return "\n".join([head, "", *_lines(diagnosis.findings)])


def _lines(findings: Iterable[Finding]) -> Iterable[str]:
    for finding in findings:
        yield f"{_MARKS[finding.level]:8} {finding.subject}: {finding.says}"
        if finding.remedy:
            yield f"{'':8}   -> {finding.remedy}"
