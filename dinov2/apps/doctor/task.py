"""Can this training teach anything at all, and does what it teaches help? Rules that came after those of `rules`.

`rules` reads how well the student follows its teacher, and says so. Two kinds of failures pass it: a task that is no
task (the configuration tells), and one that is learned without any use (accuracies tell). The rules here look for these
and come last: they may replace a verdict by a more serious one, and they never take one back but "too early".
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dinov2.apps.doctor.findings import Finding, note, problem
from dinov2.apps.doctor.remedies import harder, moving
from dinov2.apps.doctor.run_log import RunLog, Series
from dinov2.apps.doctor.signs import Signs, first_of, recent
from dinov2.apps.doctor.verdicts import Judged, more_serious
from dinov2.configs import Config
from dinov2.engine.schedules import CosineScheduler, total_steps

__all__ = ["examine_task"]

_FEWEST_STEPS = 100

# Of the teacher's first weights: when more is left at the end of a run, the teacher has not moved.
_MOST_KEPT = 0.9

# Share of an image's area from which on a crop is taken for the whole of it.
_WHOLE = 0.95

# A change of accuracy in points, and how many evaluations show whether there is one.
_GAIN = 1.0
_LOSS = 2.0
_FEWEST_EVALUATIONS = 3


def examine_task(log: RunLog, signs: Signs, verdict: str, findings: list[Finding]) -> tuple[str, list[Finding]]:
    """The verdict and findings of `examine_learning`, with those of the rules here."""
    judged = [found for rule in (_frozen, _trivial) if (found := rule(log, signs)) is not None]
    # Of a student that learns nothing, accuracy says nothing new; in a broken network a rise of it is a remark already.
    if not judged and verdict in ("learns", "starved") and (hollow := _hollow(log, signs)) is not None:
        judged.append(hollow)
    for found in judged:
        verdict = more_serious(verdict, found.verdict)
    deciding = any(found.verdict == verdict for found in judged)
    if deciding:
        findings = [kept for finding in findings if (kept := _beside(finding, verdict, signs)) is not None]
    # What decides stands first.
    ahead = [] if deciding else findings[:1]
    findings = [*ahead, *(found.finding for found in judged), *findings[len(ahead) :], *_remarks(log, signs)]
    if verdict == "too early" and not signs.known and signs.done >= _FEWEST_STEPS:
        return "unknown", [_unknown(log, signs), *findings]
    return verdict, findings


def _unknown(log: RunLog, signs: Signs) -> Finding:
    """Steps enough, and nothing in the log that could be judged."""
    if not signs.cross_entropy:
        return note("learning", "the log holds no DINO or iBOT term", "look at training_metrics.json: is it whole?")
    says = "neither the number of prototypes nor health is there, so the losses do not say what the student knows"
    return note("learning", says, "put the run's readable config.yaml beside its log")


def _beside(finding: Finding, verdict: str, signs: Signs) -> Finding | None:
    """What a finding of `rules` is worth where the cause lies elsewhere: no advice of its own, and no guess."""
    if finding.subject == "learning":
        return replace(finding, level="note", remedy="") if "known" in finding.facts else None
    # Without health, a student that cannot follow looks like a teacher that is sure of nothing.
    if finding.subject == "teacher" and verdict == "frozen" and not signs.entropy:
        return None
    return finding


def _frozen(log: RunLog, signs: Signs) -> Judged | None:
    """Momentum that leaves more than nine tenths of the teacher's first weights, or a learning rate of 0."""
    if signs.peak_lr is not None and signs.peak_lr <= 0 and signs.done >= _FEWEST_STEPS:
        says = f"the learning rate has been 0 in all {signs.done:,} steps: neither student nor teacher moves"
        return Judged("frozen", problem("learning rate", says, "optim.base_lr=0.001, the preset's", lr=0.0))
    if max(signs.done, signs.total or 0) < _FEWEST_STEPS:
        return None
    kept, ended = _kept(log, signs.done), signs.total is None or signs.done >= signs.total
    at_end = kept * _kept_from(log.cfg, signs.done)
    if not at_end > _MOST_KEPT:
        return None
    momentum = recent(log.series("mom"))
    if at_end == 1.0:
        says = "the teacher never moves, because its momentum is 1 throughout: it stays what it was at the start"
    else:
        says = (
            f"the teacher hardly moves: its momentum is so near 1 that {at_end:.0%} of its first weights "
            f"{'are' if ended else 'will be'} left at the end"
        )
    says += f", and the teacher is what is evaluated and kept{_accuracies(log)}"
    return Judged("frozen", problem("teacher", says, moving(signs), kept=at_end, momentum=momentum))


def _trivial(log: RunLog, signs: Signs) -> Judged | None:
    """No DINO or iBOT term, or two views that do not differ."""
    if log.cfg is None:
        return None
    cfg = log.cfg
    dino, patches = cfg.dino.loss_weight > 0, cfg.ibot.loss_weight > 0 and _masks(cfg)
    facts = {"dino": cfg.dino.loss_weight, "ibot": cfg.ibot.loss_weight, "masks": cfg.ibot.mask_sample_probability}
    if not dino and not patches:
        why = "dino.loss_weight is 0"
        why += " and ibot.loss_weight too" if not cfg.ibot.loss_weight else ", and no patch is masked for the iBOT term"
        beside = "; KoLeo alone spreads images apart, whatever they show" if cfg.dino.koleo_loss_weight else ""
        says = f"no term of the loss compares what student and teacher see ({why}){beside}{_accuracies(log)}"
        return Judged("trivial", problem("task", says, "dino.loss_weight=1.0", **facts))
    if dino and not _masks(cfg) and _whole_images(cfg) and not _colours(cfg):
        says = (
            "student and teacher see the same pixels: all crops are (nearly) whole images, no colour is changed and "
            f"no patch masked, so that recognising pixels is enough{_accuracies(log)}"
        )
        return Judged("trivial", problem("task", says, harder(cfg), **facts))
    return None


def _hollow(log: RunLog, signs: Signs) -> Judged | None:
    """The loss is below its first value, and no accuracy has come to more than without training, or rises.

    Only from half of the run on: accuracy may dip at a start. An accuracy that does not rise is no sign where the
    training began from weights; one that falls by two points is.
    """
    first, now = first_of(signs.cross_entropy), recent(signs.cross_entropy)
    young = signs.total is not None and signs.done < 0.5 * signs.total
    curves = {name: finite for name, series in log.accuracies.items() if (finite := _finite(series))}
    if young or not now < first or not curves:
        return None
    found = [_useless(log, signs, name, curve) for name, curve in curves.items()]
    if not all(found):  # one that rises is enough
        return None
    says = f"the {signs.term} term fell from {first:.2f} to {now:.2f}, but {'; '.join(found)}"
    facts = {name: [value for _, value in curve] for name, curve in curves.items()}
    return Judged("hollow", problem("accuracy", says, harder(log.cfg), **facts))


def _useless(log: RunLog, signs: Signs, name: str, curve: Series) -> str:
    """What says in one curve of accuracy that training was of no use, in a few words; "" for nothing."""
    values = [value for _, value in curve]
    start, last, best = values[0], values[-1], max(values)
    untrained = log.baselines.get("untrained", math.nan) if name.startswith("k-NN") else math.nan
    if last <= untrained + _GAIN:
        return f"{name} is {last:.1f} %, and {untrained:.1f} % without any training"
    if len(values) < _FEWEST_EVALUATIONS or curve[-2][0] + 1 < signs.warmup:
        return ""
    if last < start - _LOSS:
        return f"{name} fell from {start:.1f} to {last:.1f} %"
    from_weights = log.cfg is not None and bool(log.cfg.MODEL.WEIGHTS or log.cfg.student.pretrained_weights)
    if best <= start + _GAIN and not from_weights:
        return f"{name} did not rise in {len(values)} evaluations ({start:.1f} -> {last:.1f} %)"
    return ""


def _remarks(log: RunLog, signs: Signs) -> Iterator[Finding]:
    """What makes the task easier than it need be, and what pixels alone are worth."""
    cfg = log.cfg
    if cfg is not None and cfg.ibot.loss_weight > 0 and not _masks(cfg):
        says = "ibot.loss_weight is above 0, but no patch is ever masked, so that there is nothing to predict"
        yield note("patches", says, "ibot.mask_sample_probability=0.5 'ibot.mask_ratio_min_max=[0.1,0.5]'")
    if cfg is not None and cfg.dino.loss_weight > 0 and _whole_images(cfg) != (not _colours(cfg)):
        if _whole_images(cfg):
            says = "all crops are (nearly) whole images and differ in colour alone, which teaches little about shapes"
        else:
            says = "crops differ in place and size alone: their colours give away which image they are from"
        yield note("views", says, harder(cfg))
    pixels = log.baselines.get("raw_pixels", math.nan)
    for name, series in log.accuracies.items():
        curve = _finite(series)
        done = signs.total is not None and signs.done >= signs.total
        if name.startswith("k-NN") and done and curve and curve[-1][1] < pixels:
            says = f"{name} is {curve[-1][1]:.1f} % at the end, less than the {pixels:.1f} % of raw pixels"
            yield note("accuracy", says, "a longer run (optim.epochs)", accuracy=curve[-1][1], raw_pixels=pixels)


def _accuracies(log: RunLog) -> str:
    """`; k-NN top-1 20.4 -> 20.4 %` for what was evaluated twice or more."""
    curves = {name: finite for name, series in log.accuracies.items() if len(finite := _finite(series)) > 1}
    return "".join(f"; {name} {curve[0][1]:.1f} -> {curve[-1][1]:.1f} %" for name, curve in curves.items())


def _kept(log: RunLog, done: int) -> float:
    """Share of the teacher's first weights that `done` steps have left; NaN where neither log nor schedule tells."""
    momenta = log.series("mom")
    # A log whose beginning is missing shows the end of the schedule alone, where momentum is near 1 by design.
    if momenta and momenta[0][0] <= 0.1 * done:
        steps, values = zip(*momenta, strict=True)
        return float(np.prod(np.interp(np.arange(done), steps, values)))
    return float(np.prod(_momentum(log.cfg)[:done])) if log.cfg is not None else math.nan


def _kept_from(cfg: Config | None, done: int) -> float:
    """Share of the teacher's weights after `done` steps that the rest of the schedule leaves."""
    return float(np.prod(_momentum(cfg)[done:])) if cfg is not None else 1.0


def _momentum(cfg: Config) -> NDArray[np.float64]:
    teacher = cfg.teacher
    return CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, total_steps(cfg)).schedule


def _masks(cfg: Config) -> bool:
    """Whether patches of the student's global crops are masked."""
    return cfg.ibot.mask_sample_probability > 0 and cfg.ibot.mask_ratio_min_max[1] > 0


def _whole_images(cfg: Config) -> bool:
    crops = cfg.crops
    local = crops.local_crops_number == 0 or crops.local_crops_scale[0] >= _WHOLE
    return crops.global_crops_scale[0] >= _WHOLE and local


def _colours(cfg: Config) -> bool:
    """Whether anything but place, size and side of a crop differs between views."""
    crops = cfg.crops
    jitter = crops.color_jitter_p > 0 and crops.color_jitter_strength > 0
    return jitter or crops.grayscale_p > 0 or crops.solarize_p > 0 or max(crops.blur_p[:2]) > 0


def _finite(series: Series) -> Series:
    return [(iteration, value) for iteration, value in series if math.isfinite(value)]
