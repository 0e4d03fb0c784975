"""Numbers of a run's log on one scale, so that rules can say what they mean.

The leading term of the loss is a cross-entropy between the teacher's assignments and the student's. Three quantities in
nats place it. *Guessing* is the cross-entropy of a student that knows how often each prototype is used and nothing
about the crop. The teacher's *message* is what its assignments tell one crop from another. What the student *knows* is
guessing less its cross-entropy: above 0 it says something about the crop, and it can at most reach the message.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

from dinov2.apps.doctor.run_log import MetricSeries, RunLog
from dinov2.configs import Config
from dinov2.engine.schedules import scaled_lr, total_steps
from dinov2.errors import DinoError

__all__ = ["Signs", "finite", "first_value", "read_signs", "recent", "trend", "wavering"]

_RECENT = 0.25
# A change is one when it is this many standard errors large.
_CLEAR = 3.0


@dataclass(frozen=True)
class _Trend:
    """Means of the two halves of the judged part of a series, and whether they differ by more than its noise."""

    before: float
    after: float
    error: float
    """Standard error of the difference."""

    @property
    def rises(self) -> bool:
        """Whether the second half is clearly higher."""
        return self.after - self.before > _CLEAR * self.error

    @property
    def falls(self) -> bool:
        """Whether the second half is clearly lower."""
        return self.before - self.after > _CLEAR * self.error


@dataclass(frozen=True)
class Signs:
    """Input of the rules. Series are empty where the log lacks them."""

    done: int
    """Steps done."""
    total: int | None
    warmup: int
    """Steps in which the learning rate grows."""
    term: str = "DINO"
    """The term that is judged: DINO, or iBOT where there is none."""
    ln_k: float | None = None
    """Natural logarithm of the number of prototypes: the cross-entropy with a uniform teacher."""
    cross_entropy: MetricSeries = field(default_factory=list)
    entropy: MetricSeries = field(default_factory=list)
    """Mean entropy of the teacher's assignments."""
    marginal: MetricSeries = field(default_factory=list)
    """Entropy of their mean over the batch."""
    message: MetricSeries = field(default_factory=list)
    known: MetricSeries = field(default_factory=list)
    koleo: MetricSeries = field(default_factory=list)
    """-log of the distance to the nearest class token, a crop's mean."""
    waiting: MetricSeries = field(default_factory=list)
    """Share of the time spent waiting for data."""
    peak_lr: float | None = None
    teacher_temp: MetricSeries = field(default_factory=list)


def read_signs(log: RunLog) -> Signs:
    """The signs of a run's log."""
    cfg = log.cfg
    local, whole = log.series("dino_local_crops_loss"), log.series("dino_global_crops_loss")
    dino = _combined(local, whole, lambda one, other: one + other) if local and whole else local or whole
    term, cross_entropy = ("DINO", dino) if dino else ("iBOT", [(i, 2 * value) for i, value in log.series("ibot_loss")])
    prefix = "" if dino else "patch_"
    entropy = log.series(f"health_{prefix}teacher_entropy")
    marginal = log.series(f"health_{prefix}marginal_entropy")
    uneven = log.series(f"health_{prefix}kl_to_uniform")
    # The two are parts of ln K, which a log without its configuration still tells in this way.
    logged = recent(_combined(uneven, marginal, lambda divergence, left: divergence + left))
    ln_k = _ln_k(cfg, term) if cfg is not None else (logged if math.isfinite(logged) else None)
    message = _combined(marginal, entropy, lambda all_rows, one_row: all_rows - one_row)
    sizes = log.series("current_batch_size")
    batch = int(sizes[-1][1]) if sizes and math.isfinite(sizes[-1][1]) else 0
    weight = cfg.dino.koleo_loss_weight if cfg is not None else 0.0
    return Signs(
        done=max(log.last_iteration() + 1, max(log.checkpoints, default=0)),
        total=total_steps(cfg) if cfg is not None else None,
        warmup=round(cfg.optim.warmup_epochs * cfg.train.OFFICIAL_EPOCH_LENGTH) if cfg is not None else 0,
        term=term,
        ln_k=ln_k,
        cross_entropy=cross_entropy,
        entropy=entropy,
        marginal=marginal,
        message=message,
        known=_known(cross_entropy, marginal, message, ln_k, 2 * batch if term == "DINO" else 0),
        # The logged term is the weight times the mean over two crops.
        koleo=[(i, value / weight) for i, value in log.series("koleo_loss")] if weight > 0 else [],
        waiting=_combined(
            log.series("data_time"), log.series("iter_time"), lambda data, step: data / step if step > 0 else math.nan
        ),
        peak_lr=_peak_lr(log, batch),
        teacher_temp=log.series("teacher_temp"),
    )


def recent(series: MetricSeries) -> float:
    """Median of the finite values in the last quarter of the iterations of a series; NaN for none."""
    if not series:
        return math.nan
    start = series[-1][0] - _RECENT * (series[-1][0] - series[0][0])
    values = [value for i, value in series if i >= start and math.isfinite(value)]
    return median(values) if values else math.nan


def finite(series: MetricSeries) -> MetricSeries:
    """The finite values of a series."""
    return [(iteration, value) for iteration, value in series if math.isfinite(value)]


def first_value(series: MetricSeries) -> float:
    """The first finite value of a series; NaN for none."""
    return next((value for _, value in series if math.isfinite(value)), math.nan)


def wavering(series: MetricSeries) -> float:
    """Mean change from value to value, without what the series gains or loses in all; NaN for none."""
    values = [value for _, value in series if math.isfinite(value)]
    if len(values) < 4:
        return math.nan
    travelled = sum(abs(after - before) for before, after in pairwise(values))
    return (travelled - abs(values[-1] - values[0])) / (len(values) - 1)


def trend(series: MetricSeries, *, start: int = 0) -> _Trend | None:
    """The two halves of the finite values from iteration `start` on; None where a half has fewer than four."""
    values = [value for i, value in series if i >= start and math.isfinite(value)]
    half = len(values) // 2
    if half < 4:
        return None
    first, second = values[-2 * half : -half], values[-half:]
    return _Trend(fmean(first), fmean(second), math.sqrt(_squared_error(first) + _squared_error(second)))


def _squared_error(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def _known(
    cross_entropy: MetricSeries, marginal: MetricSeries, message: MetricSeries, ln_k: float | None, batch: int
) -> MetricSeries:
    """Guessing less cross-entropy; guessing is that of the last row with health, and ln K without health."""
    if not marginal:
        return [(i, ln_k - value) for i, value in cross_entropy] if ln_k is not None else []
    messages = dict(message)

    def guessing(iteration: int, of_batch: float) -> float:
        # A batch whose rows are all told apart is too small to show how often each prototype is used.
        saturated = batch > 0 and messages.get(iteration, 0.0) > 0.9 * math.log(batch)
        return ln_k if saturated and ln_k is not None else of_batch

    levels = [(i, guessing(i, value)) for i, value in marginal if math.isfinite(value)]
    known, at, level = [], 0, levels[0][1] if levels else math.nan
    for iteration, value in cross_entropy:  # health has fewer rows, and how often prototypes are used changes slowly
        while at < len(levels) and levels[at][0] <= iteration:
            level, at = levels[at][1], at + 1
        known.append((iteration, level - value))
    return known


def _combined(left: MetricSeries, right: MetricSeries, combine: Callable[[float, float], float]) -> MetricSeries:
    """`combine` of both values where both series have the iteration."""
    others = dict(right)
    return [(i, combine(value, others[i])) for i, value in left if i in others]


def _ln_k(cfg: Config, term: str) -> float:
    separate = term == "iBOT" and cfg.ibot.separate_head
    return math.log(cfg.ibot.head_n_prototypes if separate else cfg.dino.head_n_prototypes)


def _peak_lr(log: RunLog, batch: int) -> float | None:
    rates = [value for _, value in finite(log.series("lr"))]
    if log.cfg is not None and log.rows:
        with suppress(DinoError):
            rates.append(scaled_lr(log.cfg.optim, batch))
    return max(rates, default=None)
