"""From the parsed arguments of `dinov2 eval knn` to its figures: the modules of the project that take part.

Opening a weight file, running a model and reading images are chapters of their own, so their rooms are not counted;
nor is the ground floor, nor what runs after the last figure.
"""

import sys
from pathlib import Path
from types import FrameType

import dinov2
from dinov2.apps.evaluation import context, protocols
from dinov2.cli import build_parser
from dinov2.eval.knn.evaluate import evaluate_knn
from tests.runs import pictures

PACKAGE = Path(dinov2.__file__).resolve().parent
ROOMS = ("apps/evaluation", "encode", "eval")
MODULES = {
    "apps/evaluation": {"protocols", "context", "datasets", "features"},
    "encode": {"stream", "tokens", "cache"},
    "eval": {"evaluate", "search", "scoring", "metrics", "result"},
}


def test_the_modules_between_the_arguments_and_the_figure_are_few(run, here, monkeypatch, capsys):
    for part in ("train", "val"):
        pictures(here / part, n=6, classes=2)
    arguments = build_parser().parse_args(
        f"eval knn --model {run} --train-dataset train --val-dataset val --nb-knn 3 --no-cache --output-dir out".split()
    )
    taking_part: dict[str, set[str]] = {room: set() for room in ROOMS}
    is_counted = True
    load = context.load

    def note(frame: FrameType, event: str, argument: object) -> None:
        path, is_function = Path(frame.f_code.co_filename or "."), frame.f_code.co_flags & 2  # CO_NEWLOCALS
        if event != "call" or not is_counted or not is_function or not path.is_relative_to(PACKAGE):
            return
        for room in ROOMS:
            if path.is_relative_to(PACKAGE / room):
                taking_part[room].add(path.stem)

    def opened(*args, **options):
        nonlocal is_counted
        is_counted = False
        model = load(*args, **options)
        is_counted = True
        return model

    def measured(*args, **options):
        nonlocal is_counted
        rows = evaluate_knn(*args, **options)
        is_counted = False
        return rows

    monkeypatch.setattr(context, "load", opened)
    monkeypatch.setattr(protocols, "evaluate_knn", measured)
    sys.setprofile(note)
    try:
        assert arguments.run(arguments) == 0
    finally:
        sys.setprofile(None)
    assert "top-1" in capsys.readouterr().out
    assert taking_part == MODULES
