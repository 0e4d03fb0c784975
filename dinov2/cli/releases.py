"""`dinov2 releases`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2.cli.common import ExtractionProgress, add_command, check_file_place, say

if TYPE_CHECKING:
    from dinov2.apps.releases import Answer
    from dinov2.models.releases import Release

__all__ = ["add_to"]

_KINDS = ("backbone", "classifier", "depth", "segmentation", "mask2former")


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "releases",
        _run,
        help="list the released weight files, and check their addresses",
        description="List the released weight files: backbones, classifiers, depth and segmentation heads.\n"
        "--check asks for each of them (nothing is downloaded) and fails when one does not answer.",
        example="dinov2 releases --kind backbone",
    )
    parser.add_argument("--kind", choices=_KINDS, help="only files of this kind")
    parser.add_argument("--check", action="store_true", help="ask the server for every file")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON; - writes it instead of the text")


def _run(arguments: argparse.Namespace) -> int:
    from dinov2.apps.releases import as_documents, check_releases, list_releases
    from dinov2.whole_files import write_json

    rows, answers = list_releases(arguments.kind), None
    check_file_place(arguments.json, task="releases")
    if arguments.check:
        with ExtractionProgress() as progress:
            answers = check_releases(rows, progress=progress("files"))
    if arguments.json == "-":
        say(json.dumps(as_documents(rows, answers), indent=2))
    else:
        for line in _checked(answers) if answers is not None else _listed(rows):
            say(line)
        if arguments.json:
            write_json(Path(arguments.json).expanduser(), as_documents(rows, answers))
    return 1 if any(answer.fault for answer in answers or ()) else 0


def _listed(rows: "tuple[Release, ...]") -> list[str]:
    table = [("name", "kind", "trained on", "reported", "address")]
    table += [(row.name, row.kind, row.dataset, _reported(row), row.url) for row in rows]
    return _columns(table)


def _reported(row: "Release") -> str:
    """The figure that tells rows of one kind apart best."""
    from dinov2.models.releases import METRICS

    if not row.accuracy:
        return ""
    metric = "imagenet_linear" if row.kind == "backbone" else row.accuracy[0].metric
    return f"{METRICS[metric].title} {row.shown(metric)} {METRICS[metric].unit}"


def _checked(answers: "tuple[Answer, ...]") -> list[str]:
    table = [("name", "answers", "size", "address")]
    for answer in answers:
        size = "" if answer.size is None else f"{answer.size / 1e6:.1f} MB"
        table.append((answer.release.name, answer.fault or "yes", size, answer.release.url))
    good = sum(answer.fault is None for answer in answers)
    return [*_columns(table), f"{good} of {len(answers)} files answer"]


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
