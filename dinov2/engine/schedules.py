"""Learning rates, weight decay, teacher momentum and teacher temperature as functions of the step (DINOv2, table 16).

A schedule is an array in float64 computed once, exactly as the release does, with the release's quirks: the peak occurs
twice (last warm-up step, first cosine step), and the final value is only reached after the end. An "epoch" here is
`train.OFFICIAL_EPOCH_LENGTH` steps, whatever the size of the data set. The scaled learning rate is a function of the
configuration and the global batch and is never written back.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dinov2.errors import ConfigError

__all__ = ["SCALING_RULES", "CosineScheduler", "Hyper", "Schedules", "scaled_lr", "total_steps"]

SCALING_RULES = ("sqrt_wrt_1024", "linear_wrt_256", "none")
"""Values of `optim.scaling_rule`: how `optim.base_lr` becomes the learning rate of a global batch."""


class CosineScheduler:
    """`freeze_iters` zeros, a linear warm-up, then half a cosine from `base_value` towards `final_value`.

    `schedule[it]` is the value at iteration `it` (from 0), and `final_value` from `total_iters` on. The values before
    that are in the attribute `schedule`, float64 `[total_iters]`. Raises `ConfigError` when freeze and warm-up together
    are longer than the whole.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0,
        freeze_iters: int = 0,
    ) -> None:
        n_cosine = total_iters - warmup_iters - freeze_iters
        if n_cosine < 0:
            raise ConfigError(
                f"a schedule of {total_iters} iterations cannot hold {warmup_iters} of warm-up and {freeze_iters} "
                "frozen ones; make the warm-up shorter or the training longer"
            )
        self.final_value = final_value
        self.total_iters = total_iters
        # max: an empty range must not divide by its length of zero.
        progress = np.arange(n_cosine) / max(n_cosine, 1)
        self.schedule: NDArray[np.float64] = np.concatenate(
            (
                np.zeros(freeze_iters),
                np.linspace(start_warmup_value, base_value, warmup_iters),
                final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress)),
            )
        )

    def __getitem__(self, it: int) -> float:
        return self.final_value if it >= self.total_iters else float(self.schedule[it])

    def zero_until(self, iteration: int) -> "CosineScheduler":
        """Set the values of the iterations before `iteration` to zero; returns itself."""
        self.schedule[:iteration] = 0.0
        return self


class Hyper(NamedTuple):
    """Hyper-parameters of one step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher
    teacher_temp: float
    last_layer_lr: float  # lr, but zero while the heads' last layers are frozen


@dataclass(frozen=True)
class Schedules:
    """The five schedules of a training."""

    lr: CosineScheduler
    weight_decay: CosineScheduler
    momentum: CosineScheduler
    teacher_temp: CosineScheduler
    last_layer_lr: CosineScheduler

    @classmethod
    def from_config(cls, cfg: Any, global_batch: int) -> "Schedules":
        """Schedules of a training configuration (its sections optim, teacher and train) for a batch over all processes.

        The teacher temperature warms up over its own number of epochs, which may exceed those of the training.
        Raises `ConfigError` when the warm-up is longer than the training.
        """
        optim, teacher = cfg.optim, cfg.teacher
        steps = total_steps(cfg)
        warmup = _epochs_to_steps(cfg, optim.warmup_epochs)
        if warmup > steps:
            raise ConfigError(
                f"optim.warmup_epochs is {optim.warmup_epochs} but optim.epochs is {optim.epochs}; the warm-up is a "
                "part of the training, so lower the first or raise the second"
            )
        peak = scaled_lr(optim, global_batch)
        temperature_warmup = _epochs_to_steps(cfg, teacher.warmup_teacher_temp_epochs)
        frozen = _epochs_to_steps(cfg, optim.freeze_last_layer_epochs)
        return cls(
            lr=CosineScheduler(peak, optim.min_lr, steps, warmup),
            weight_decay=CosineScheduler(optim.weight_decay, optim.weight_decay_end, steps),
            momentum=CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, steps),
            teacher_temp=CosineScheduler(
                teacher.teacher_temp,
                teacher.teacher_temp,
                temperature_warmup,
                temperature_warmup,
                teacher.warmup_teacher_temp,
            ),
            last_layer_lr=CosineScheduler(peak, optim.min_lr, steps, warmup).zero_until(frozen),
        )

    def at(self, step: int) -> Hyper:
        """The values of step `step`, counted from 0 over the whole training."""
        return Hyper(
            lr=self.lr[step],
            weight_decay=self.weight_decay[step],
            momentum=self.momentum[step],
            teacher_temp=self.teacher_temp[step],
            last_layer_lr=self.last_layer_lr[step],
        )


def scaled_lr(optim: Any, global_batch: int) -> float:
    """The peak learning rate: `optim.base_lr` scaled to a batch of `global_batch` images over all processes."""
    match optim.scaling_rule:
        case "sqrt_wrt_1024":
            return float(optim.base_lr * math.sqrt(global_batch / 1024))
        case "linear_wrt_256":
            return float(optim.base_lr * global_batch / 256)
        case "none":
            return float(optim.base_lr)
    raise ConfigError(f"optim.scaling_rule is {optim.scaling_rule!r}; choose one of {', '.join(SCALING_RULES)}")


def total_steps(cfg: Any) -> int:
    """Steps of the whole training: `optim.epochs * train.OFFICIAL_EPOCH_LENGTH`."""
    return _epochs_to_steps(cfg, cfg.optim.epochs)


def _epochs_to_steps(cfg: Any, epochs: float) -> int:
    steps: int = round(epochs * cfg.train.OFFICIAL_EPOCH_LENGTH)
    return steps
