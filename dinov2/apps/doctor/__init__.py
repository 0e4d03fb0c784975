"""`dinov2 doctor`: readiness of a machine, and whether a run learns. Findings in words, each with what to do."""

import os

from dinov2.apps.doctor.findings import Diagnosis, Finding, counted, note
from dinov2.apps.doctor.machine import examine_machine
from dinov2.apps.doctor.packages import examine_packages
from dinov2.apps.doctor.rules import VERDICTS, examine_learning
from dinov2.apps.doctor.run_log import RunLog, read_run_log
from dinov2.apps.doctor.signs import read_signs
from dinov2.apps.doctor.state import examine_state

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
    signs = read_signs(log)
    state, finding = examine_state(log, signs)
    verdict, findings = examine_learning(log, signs)
    if log.unusable:
        says = f"the configuration cannot be read, and what needs it was left out ({log.unusable})"
        findings = [*findings, note("configuration", says, "mend config.yaml, or put the original in its place")]
    return Diagnosis(log.name, verdict, [finding, *findings], state=state)


def in_words(diagnosis: Diagnosis) -> str:
    """The diagnosis for people: the verdict, then a line a finding, with what to do below."""
    if diagnosis.patient == "machine":
        problems = sum(finding.level == "problem" for finding in diagnosis.findings)
        head = "this machine is ready" if not problems else f"this machine has {counted(problems, 'problem')}"
    else:
        head = f"{diagnosis.patient}: {diagnosis.verdict} ({VERDICTS[diagnosis.verdict]}), {diagnosis.state}"
    lines = [head, ""]
    for finding in diagnosis.findings:
        lines.append(f"{_MARKS[finding.level]:8} {finding.subject}: {finding.says}")
        if finding.remedy:
            lines.append(f"{'':8}   -> {finding.remedy}")
    return "\n".join(lines)
