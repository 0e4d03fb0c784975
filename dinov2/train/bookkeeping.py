"""What a training writes down on the way: rows of metrics, skipped steps, unreadable images, exported teachers."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.checkpoints.files import save_teacher
from dinov2.data.crops.collate import CropBatch
from dinov2.data.stream import SampleStream
from dinov2.distributed import all_reduce_sum, get_global_size, is_main_process
from dinov2.engine.optim import StepOutcome
from dinov2.engine.progress import ProgressFigures
from dinov2.engine.schedules import Hyper
from dinov2.errors import TrainingDiverged
from dinov2.logging import MetricsWriter
from dinov2.models.config import BackboneConfig
from dinov2.train.objective import LossTerms
from dinov2.train.setup import Training

__all__ = ["SkippedSteps", "Unreadable", "export_teacher", "metrics_row"]

_LOG = logging.getLogger("dinov2")


def metrics_row(
    training: Training, step: int, losses: LossTerms, hyper: Hyper, outcome: StepOutcome, figures: ProgressFigures
) -> dict[str, Any]:
    """One row of `training_metrics.json`: the release's keys and meanings first, then ours.

    Losses are those of this step, averaged over the processes; `total_loss` is the release's sum of the logged terms,
    `loss` what is optimised. Waits for the device.
    """
    terms = losses.logged
    values = torch.stack([losses.total.detach().float(), *(term.float() for term in terms.values())])
    mean = (all_reduce_sum(values) / get_global_size()).tolist()
    by_name = dict(zip(terms, mean[1:], strict=True))
    return {
        "iteration": step,
        "iter_time": figures.iter_time,
        "data_time": figures.data_time,
        "lr": hyper.lr,
        "wd": hyper.weight_decay,
        "mom": hyper.momentum,
        "last_layer_lr": hyper.last_layer_lr,
        "current_batch_size": training.cfg.train.batch_size_per_gpu,
        "total_loss": sum(by_name.values()),
        **by_name,
        "loss": mean[0],
        "teacher_temp": hyper.teacher_temp,
        **{f"grad_norm_{part}": norm.item() for part, norm in outcome.grad_norms.items()},
        "images_per_second": figures.images_per_second,
    }


class SkippedSteps:
    """Notices steps with a non-finite loss or gradient; several in a row end the run.

    On a CPU the outcome is at hand; on other devices outcomes pile up until `check`, which waits for the device.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._stream = SampleStream(len(training.dataset), training.cfg.train.seed)
        self._open: list[tuple[int, Tensor, LossTerms, Tensor]] = []
        facts = training.run.checkpoints.read_meta(training.first) if training.first else {}
        in_a_row = facts.get("skipped_in_a_row")
        self.in_a_row = in_a_row if isinstance(in_a_row, int) else 0
        if is_main_process() and training.run.skipped.exists():
            with MetricsWriter(training.run.skipped) as written:
                written.cut_back(training.first)
        self.count = 0

    def note(self, step: int, outcome: StepOutcome, losses: LossTerms, batch: CropBatch) -> None:
        """Takes in the outcome of a step."""
        detached = losses._replace(total=losses.total.detach())
        self._open.append((step, outcome.finite, detached, batch.sample_numbers))
        if outcome.finite.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Writes skipped steps down; raises `TrainingDiverged` after `train.max_skipped_steps` in a row."""
        for step, finite, losses, numbers in self._open:
            if bool(finite):
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.count += 1
            self._write(step, losses, numbers)
        self._open.clear()
        if self.in_a_row >= self._training.cfg.train.max_skipped_steps:
            raise TrainingDiverged(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row and the run was stopped; "
                f"the steps, losses and images are in {self._training.run.skipped}. Try a lower optim.base_lr, a "
                "longer optim.warmup_epochs, a smaller optim.clip_grad or train.precision=fp32, in a new --output-dir"
            )

    def _write(self, step: int, losses: LossTerms, numbers: Tensor) -> None:
        if not is_main_process():
            return
        indices = self._stream.index_of(numbers.numpy()).tolist() if bool((numbers >= 0).all()) else []
        terms = {name: _plain(value) for name, value in {"total": losses.total, **losses.logged}.items()}
        _LOG.warning(f"step {step} was skipped: its loss ({terms['total']}) or gradient is not finite")
        row = {
            "iteration": step,
            "losses": terms,
            "sample_numbers": numbers.tolist(),
            "images": [self._training.dataset.path_of(index) for index in indices],
        }
        with MetricsWriter(self._training.run.skipped) as written:
            written.write(row)


class Unreadable:
    """Images that could not be read: counted, listed in the run's folder, and said once in a while."""

    def __init__(self, training: Training) -> None:
        self._run = training.run
        self.reasons = self._run.read_unreadable()
        self._written = len(self.reasons)

    def note(self, batch: CropBatch) -> None:
        """Takes in the failures of a batch; the first of a run is said at once."""
        for path, reason in batch.failures:
            if not self.reasons:
                _LOG.warning(f"an image cannot be read and is replaced by another: {reason}")
            self.reasons.setdefault(path, reason)

    def write(self) -> None:
        """Brings the list in the run's folder up to date."""
        if len(self.reasons) > self._written and is_main_process():
            self._run.note_unreadable(self.reasons)
            self._written = len(self.reasons)


def export_teacher(training: Training, file: Path) -> None:
    """Writes the teacher in the release's layout, and its backbone as safetensors beside it."""
    if not is_main_process():
        return
    backbone: Any = training.objective.teacher["backbone"]
    config = BackboneConfig.from_model(backbone, mean=training.cfg.crops.mean, std=training.cfg.crops.std)
    save_teacher(file, training.objective.teacher.state_dict(), config)


def _plain(value: Tensor) -> float | str:
    number = value.item()
    return number if math.isfinite(number) else str(number)  # JSON has no word for the others
