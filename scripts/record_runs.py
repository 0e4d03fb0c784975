"""Records the small runs in tests/apps/recorded_runs that `dinov2 doctor` is tested on: really trained, made to fail.

    python scripts/record_runs.py healthy collapse learning_rate temperature data_bound
    python scripts/record_runs.py still_teacher one_view koleo_only collapse_no_koleo temperature_no_koleo
    python scripts/record_runs.py weight_decay tiny_crops unchanged
    python scripts/record_runs.py healthy --into somewhere/else

Each is the preset `toy` with less data and fewer steps, and the one thing changed that its name says. What is kept is
what the doctor reads: the configuration and every row of the logs, none left out (a row is written every tenth step,
with health in each). Weights, checkpoints and pictures are thrown away.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from torch import Tensor

from dinov2.apps.train import run_training, training_config
from dinov2.data.datasets.toy import Toy
from dinov2.errors import TrainingDiverged
from dinov2.logging import setup_logging
from dinov2.loss.centering import Center

RECORDED = Path(__file__).resolve().parents[1] / "tests" / "apps" / "recorded_runs"
KEPT = (
    "config.yaml",
    "training_metrics.json",
    "skipped_steps.json",
    "knn_curve.json",
    "evaluation_metrics.json",
)

COMMON = (
    "train.dataset_path=toy:split=TRAIN:n=1000",
    "train.batch_size_per_gpu=32",
    "train.num_threads=1",
    "train.device=cpu",
    "train.precision=fp32",
    "dino.head_n_prototypes=128",  # half as many as in the preset, as is the batch
    "optim.epochs=3",  # of 100 steps
    "evaluation.health_period_iterations=10",
    "evaluation.eval_period_iterations=100",
    "evaluation.knn_train_dataset=toy:split=TRAIN:n=1000",
    "evaluation.knn_val_dataset=toy:split=VAL:n=500",
)


@contextmanager
def as_it_is() -> Iterator[None]:
    """Nothing but the configuration is changed."""
    yield


@contextmanager
def without_centering() -> Iterator[None]:
    """The mean of the teacher's scores is never taken off: the center stays at zero."""

    def update(self: Center, scores: Tensor) -> None:
        return None

    with patch.object(Center, "update", update):
        yield


@contextmanager
def slow_storage() -> Iterator[None]:
    """Every read of an image takes 80 ms longer, as over a slow network."""
    read = Toy.get_tensor

    def get_tensor(self: Toy, index: int, *, channels: int = 3) -> Tensor:
        time.sleep(0.08)
        return read(self, index, channels=channels)

    with patch.object(Toy, "get_tensor", get_tensor):
        yield


class Recipe(NamedTuple):
    """One run: what is changed in the configuration, and in the code."""

    overrides: tuple[str, ...] = ()
    change: Callable[[], object] = as_it_is


# Both global crops are the whole image, bit for bit: no other box of its full area fits into a square, and blur and
# solarising are off in the preset.
ONE_VIEW = (
    "crops.global_crops_scale=[1.0,1.0]",
    "crops.local_crops_number=0",
    "crops.horizontal_flip_p=0.0",
    "crops.color_jitter_p=0.0",
    "crops.grayscale_p=0.0",
)

# About one pixel of a picture in each crop: nothing that two crops of an image have in common.
TINY_CROPS = ("crops.global_crops_scale=[0.001,0.002]", "crops.local_crops_scale=[0.001,0.002]")

NO_KOLEO = "dino.koleo_loss_weight=0.0"

RECIPES = {
    "healthy": Recipe(("optim.epochs=6", "evaluation.eval_period_iterations=200")),
    "collapse": Recipe(("train.centering=centering",), without_centering),
    "learning_rate": Recipe(("optim.base_lr=0.1",)),  # the preset's is 0.001
    "temperature": Recipe(("teacher.warmup_teacher_temp=0.5", "teacher.teacher_temp=0.5")),  # 0.02 and 0.04
    "data_bound": Recipe(("train.cache_dataset=false", "optim.epochs=1", "train.log_every=5"), slow_storage),
    # Recorded after the doctor's rules were frozen.
    "still_teacher": Recipe(("teacher.momentum_teacher=1.0", "teacher.final_momentum_teacher=1.0")),  # 0.99 to 1.0
    "one_view": Recipe(ONE_VIEW),
    # Controls: what KoLeo does to accuracy by itself, and two of the failures without it.
    "koleo_only": Recipe(("dino.loss_weight=0.0",)),
    "collapse_no_koleo": Recipe(("train.centering=centering", NO_KOLEO), without_centering),
    "temperature_no_koleo": Recipe(("teacher.warmup_teacher_temp=0.5", "teacher.teacher_temp=0.5", NO_KOLEO)),
    # Recorded after the second set of rules was written.
    "weight_decay": Recipe(("optim.weight_decay=4.0", "optim.weight_decay_end=40.0")),  # 0.04 to 0.4
    "unchanged": Recipe(),  # a control: as many steps as most
    "tiny_crops": Recipe((*TINY_CROPS, "train.OFFICIAL_EPOCH_LENGTH=50", "evaluation.eval_period_iterations=50")),
}


def record(name: str, into: Path) -> None:
    """Trains the run `name` and keeps its logs in `into/name`."""
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        stack.enter_context(recipe.change())  # type: ignore[arg-type]
        run = Path(temporary) / name
        cfg = training_config(preset="toy", overrides=[*COMMON, *recipe.overrides])
        try:
            run_training(cfg, output_dir=run, evaluations=[lambda training, iteration: None])
        except TrainingDiverged as error:
            print(f"{name}: {error}")
        (into / name).mkdir(parents=True, exist_ok=True)
        for kept in KEPT:
            if (run / kept).exists():
                shutil.copyfile(run / kept, into / name / kept)
    size = sum(file.stat().st_size for file in (into / name).iterdir())
    print(f"{name}: {size / 1000:.0f} kB in {into / name}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--into", type=Path, default=RECORDED, metavar="DIR", help=f"default: {RECORDED.name}")
    arguments = parser.parse_args()
    setup_logging()
    for name in arguments.names:
        record(name, arguments.into)


if __name__ == "__main__":
    main()
