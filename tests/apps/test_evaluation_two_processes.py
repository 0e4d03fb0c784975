"""Commands started twice by a launcher give the figures of one process, once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(n: int, *words: object, cwd: Path) -> list[str]:
    """Standard output of n processes."""
    common = {**os.environ, "PYTHONPATH": str(REPOSITORY), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "dinov2", *map(str, words)],
            cwd=cwd,
            env={**common, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(n)
    ]
    ended = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * n, "\n".join(error for _, error in ended)
    return [out for out, _ in ended]


def values(file: Path) -> list[tuple[str, str, float]]:
    return [(row["task"], row["metric"], row["value"]) for row in json.loads(file.read_text())["rows"]]


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(run, here):
    sets = ("--train-dataset", "toy:split=TRAIN:n=61", "--val-dataset", "toy:split=VAL:n=31", "--no-cache")
    knn = ("eval", "knn", "--model", run, *sets, "--nb-knn", 3, 10, "--n-per-class-list", 2, -1)
    every = ("eval", "all", "--model", run, *sets)
    for name, words in {"knn": knn, "all": every}.items():
        (alone,) = launched(1, *words, "--output-dir", f"{name}1", cwd=here)
        main, other = launched(2, *words, "--output-dir", f"{name}2", cwd=here)
        assert other == "" and main.replace(f"{name}2", f"{name}1").count("\n") == alone.count("\n")
        file = f"results_eval_{name}.json"
        for one, two in zip(values(here / f"{name}1" / file), values(here / f"{name}2" / file), strict=True):
            # Sums over two halves round differently, and a fit that ends a step earlier may move an image or two.
            assert one[:2] == two[:2] and one[2] == pytest.approx(two[2], abs=1e-6 if one[0] == "knn" else 201 / 31)
