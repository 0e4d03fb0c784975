"""Many kills at random moments: `dinov2 train` from a shell, SIGKILL from outside, again and again to the end.

`test_resume.py` kills at chosen moments; here nobody chooses. Kills are counted over as many runs as it takes, each of
which must equal the unbroken one bit for bit.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.lives import equals
from tests.train.tiny_run import TINY

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="lives end by SIGKILL")

KILLS = int(os.environ.get("DINOV2_SOAK_KILLS", "25"))
SETTINGS = (
    *TINY, "optim.epochs=80", "train.checkpoint_every=2", "train.cache_dataset=false", "student.drop_path_rate=0.3",
    "ibot.loss_weight=1", "ibot.mask_sample_probability=0.5", "evaluation.eval_period_iterations=40",
)  # fmt: skip
KILLS_A_RUN = 8  # about as many come before a run is through
PATIENCE = 300  # seconds for a life of a few


@dataclass
class Figures:
    """What happened."""

    kills: int = 0
    before_training: int = 0
    during_a_save: int = 0
    runs: int = 0
    restarts: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.during_a_save} during a save, {self.before_training} before the first step), "
            f"{self.restarts} restarts, {self.runs} runs equal to the unbroken one, {self.seconds:.0f} s"
        )


@pytest.mark.slow
def test_a_few_kills_from_outside_change_nothing(tmp_path, capsys):
    soak(tmp_path, capsys, kills=3, seed=1)


@pytest.mark.soak
def test_many_kills_at_random_moments_change_nothing(tmp_path, capsys):
    soak(tmp_path, capsys, kills=KILLS, seed=0)


def soak(folder: Path, capsys: pytest.CaptureFixture[str], *, kills: int, seed: int) -> None:
    """Kills `kills` times, with delays drawn from the measured duration, and compares every run with the unbroken one.

    Each life has 0, 1 or 2 loader workers; half of the kills end the process alone and leave its workers behind.
    """
    chance, began = random.Random(seed), time.monotonic()
    start_up, training = unbroken(folder / "unbroken")
    figures = Figures()
    while figures.kills < kills:
        figures.runs += 1
        run = folder / f"run{figures.runs}"
        while figures.kills < kills and killed(run, chance, figures, start_up, training):
            figures.restarts += 1
        assert start(run, workers=chance.randrange(3)).wait(PATIENCE) == 0, said(run)
        equals(run, folder / "unbroken")
        figures.seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\nsoak, seed {seed}: {figures}; unkilled {start_up:.1f} s to begin + {training:.1f} s of training")


def unbroken(run: Path) -> tuple[float, float]:
    """Trains without a kill; the seconds until training began, and those that it took from there."""
    began = time.monotonic()
    process = start(run, workers=0)
    assert begins(process, run, PATIENCE), said(run)
    first = time.monotonic()
    assert process.wait(PATIENCE) == 0, said(run)
    return first - began, time.monotonic() - first


def killed(run: Path, chance: random.Random, figures: Figures, start_up: float, training: float) -> bool:
    """One life with a kill; False when the run was through before it came."""
    earlier, config = unfinished_saves(run), state_of(run / "config.yaml")
    process = start(run, workers=chance.randrange(3))
    if chance.random() < 0.15:
        wait(process, chance.uniform(0, start_up))
    elif begins(process, run, PATIENCE, config):
        wait(process, chance.uniform(0, 2 * training / KILLS_A_RUN))
    if process.poll() is not None:
        assert process.returncode == 0, said(run)
        return False
    if chance.random() < 0.5:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)  # with its workers, as a scheduler does
    process.wait()
    figures.kills += 1
    figures.before_training += state_of(run / "config.yaml") == config
    figures.during_a_save += bool(unfinished_saves(run) - earlier)
    return True


def start(run: Path, *, workers: int) -> subprocess.Popen[bytes]:
    """The command a user types, in a process group of its own."""
    command = [sys.executable, "-m", "dinov2", "train", "--preset", "toy", "--output-dir", str(run)]
    with open(run.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, *SETTINGS, f"train.num_workers={workers}"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[2],
        )


def begins(process: subprocess.Popen[bytes], run: Path, seconds: float, before: object = None) -> bool:
    """Waits until the life has opened its folder, in which it writes config.yaml anew."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        if state_of(run / "config.yaml") != before:
            return True
        time.sleep(0.005)
    return False


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Sleeps for that long, or until the process has ended."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def state_of(path: Path) -> tuple[int, int] | None:
    """Changes whenever the file is written."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def unfinished_saves(run: Path) -> set[tuple[str, int]]:
    """The folders of saves that nobody ended."""
    return {(path.name, path.stat().st_mtime_ns) for path in run.glob("checkpoints/.*")}


def said(run: Path) -> str:
    """The end of what the processes of a run wrote."""
    return run.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-3000:]
