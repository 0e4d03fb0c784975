"""Rules about learning, from a run's log and configuration, with what to try.

Each rule looks at one thing and returns a verdict or None. The first verdict in the order of `VERDICTS` is the run's.
Thresholds stand beside the rules, in the unit of what they judge; they hold for values of the last quarter of the log,
so that the noise of a start does not count. They were chosen on the recorded runs of docs/doctor.md.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

import dinov2.apps.doctor.remedies as remedies
from dinov2.analysis.patch_maps import HIGH_NORM_FACTOR
from dinov2.apps.doctor.findings import Finding, fine, note, problem
from dinov2.apps.doctor.remedies import HIGH_LR
from dinov2.apps.doctor.run_log import MetricSeries, RunLog
from dinov2.apps.doctor.signs import Signs, finite, first_value, recent, trend, wavering
from dinov2.configs import Config
from dinov2.engine.schedules import CosineScheduler, total_steps

__all__ = ["VERDICTS", "examine_learning"]

VERDICTS = {
    "diverged": "losses or gradients are not finite, or large steps have broken the network",
    "frozen": "teacher or student does not move, so that the model which is kept cannot get better",
    "collapsed": "the teacher says the same of every image, or all features are the same",
    "uniform": "the teacher is sure of nothing: every prototype is as likely as every other, for every image",
    "trivial": "no term of the loss asks what an image shows, or pixels alone answer it",
    "data_bound": "the model waits for data most of the time",
    "no_transfer": "the loss falls, but accuracy on labelled images does not rise",
    "stalled": "the student does not come to know more about an image than guessing",
    "learns": "the student knows more about an image than guessing",
    "too early": "too few steps to judge",
    "unknown": "the log does not say what is learned",
}
"""Every verdict, the most serious first, and its meaning."""

_FEWEST_ROWS = 8
_FEWEST_STEPS = 100
_STUDENT_TEMP = 0.1  # a teacher that is not sharper than the student teaches nothing
_ENOUGH = 0.005  # parts of ln K: what a student that learns knows beyond guessing, more than the noise of single steps
_MOST_LEFT = 0.9  # of the teacher's first weights: with more left at the end of a run the teacher has not moved
_WHOLE = 0.95  # share of an image's area from which on a crop is taken for all of it
_GAIN, _LOSS = 1.0, 2.0  # points of accuracy
_FEWEST_EVALUATIONS = 3


class _Verdict(NamedTuple):
    """A verdict, and the finding that it rests on."""

    name: str
    finding: Finding


def examine_learning(log: RunLog, signs: Signs) -> tuple[str, list[Finding]]:
    """The verdict, and all findings about learning: first those that decide, then what is worth knowing."""
    order = list(VERDICTS)
    verdicts = [verdict for rule in _RULES if (verdict := rule(log, signs)) is not None]
    verdicts.sort(key=lambda verdict: order.index(verdict.name))
    # Accuracy adds nothing where the student learns nothing; in a broken network a rise of it is a remark.
    others = [verdict for verdict in verdicts if verdict.name != "no_transfer"]
    if others[0].name not in ("data_bound", "learns"):
        verdicts = others
    # A student cannot learn from a broken teacher: that it does not is no finding of its own.
    broken = not {"diverged", "collapsed", "uniform"}.isdisjoint(verdict.name for verdict in verdicts)
    if broken:
        verdicts = [verdict for verdict in verdicts if order.index(verdict.name) < order.index("stalled")]
    name = verdicts[0].name
    findings = [verdicts[0].finding]
    for verdict in verdicts[1:]:
        findings += _beside(verdict, name, signs)
    return name, [*findings, *_remarks(log, signs, broken=broken), *_task_remarks(log, signs)]


def _beside(verdict: _Verdict, deciding: str, signs: Signs) -> list[Finding]:
    """A further finding, without advice and guesses where the deciding verdict names another cause."""
    finding = verdict.finding
    if deciding not in ("frozen", "trivial", "no_transfer"):
        return [finding]
    if finding.subject == "learning":
        return [replace(finding, level="note", remedy="")] if "known" in finding.facts else []
    # Without health, a student that cannot follow looks like a teacher that is sure of nothing.
    return [] if finding.subject == "teacher" and deciding == "frozen" and not signs.entropy else [finding]


def _not_finite(log: RunLog, signs: Signs) -> _Verdict | None:
    """Values that are not finite at the end of the log: null in a row, or as many skipped steps as end a run."""
    last = log.rows[-max(3, len(log.rows) // 4) :]
    broken = [row for row in last if any(row.get(key, 0.0) is None for key in ("total_loss", "loss"))]
    skipped = [step for step in log.skipped if log.rows and step >= int(last[0]["iteration"])]
    limit = log.cfg.train.max_skipped_steps if log.cfg is not None else 5
    if not broken and len(skipped) < limit:
        return None
    says = f"the loss or its gradients are not finite in {max(len(skipped), len(broken))} of the last steps"
    return _Verdict("diverged", problem("loss", says, remedies.smaller_steps(signs), skipped=len(log.skipped)))


def _large_steps(log: RunLog, signs: Signs) -> _Verdict | None:
    """The student knows nothing behind the warm-up, and two traces or more say that large steps broke the network."""
    if signs.ln_k is None or not signs.known or signs.done < _judged_from(signs):
        return None
    known, traces = recent(signs.known), list(_traces_of_large_steps(log, signs))
    # A teacher that says nothing lets ranks shrink and gradients die too: then it takes a third trace.
    nearer = (_collapsed, _same_features, _uniform) if signs.entropy else (_collapsed, _same_features)
    silent = any(rule(log, signs) is not None for rule in nearer)
    if known > _ENOUGH * signs.ln_k or len(traces) < 2 + silent:
        return None
    known_words = f"the student knows {known:.3f} nats beyond guessing"
    says = f"large steps have broken the network: {known_words}, and {'; '.join(traces)}"
    return _Verdict("diverged", problem("loss", says, remedies.smaller_steps(signs), known=known, traces=traces))


def _traces_of_large_steps(log: RunLog, signs: Signs) -> Iterator[str]:
    """Traces of large steps, each in a few words; any one of them may have another reason."""
    level = recent(signs.cross_entropy)
    lowest = min((value for _, value in finite(signs.cross_entropy)), default=math.nan)
    if signs.ln_k is not None and level > lowest + 0.05 * signs.ln_k:
        yield f"the {signs.term} term is at {level:.2f} and has been at {lowest:.2f}"
    if signs.peak_lr is not None and signs.peak_lr > HIGH_LR:
        yield f"the learning rate went up to {signs.peak_lr:g}"
    ranks = log.series("health_rank")
    if recent(ranks) < 0.5 * first_value(ranks):
        yield f"the features have shrunk from {first_value(ranks):.0f} directions to {recent(ranks):.0f}"
    tossing = wavering(log.series("health_spread"))
    if tossing > 0.05:
        yield f"the features are thrown about (their spread changes to and fro by {tossing:.2f} from row to row)"
    for part, norms in _gradients(log):
        norms = [(i, value) for i, value in norms if value > 0]
        early = recent(norms[: max(3, len(norms) // 4)])
        if recent(norms) < 0.01 * early:
            yield f"gradients of the {part} have died ({early:.2g} -> {recent(norms):.2g})"
    for name, series in log.accuracies.items():
        if series and series[-1][1] < series[0][1] - _LOSS:
            yield f"{name} fell from {series[0][1]:.1f} to {series[-1][1]:.1f} %"


def _frozen(log: RunLog, signs: Signs) -> _Verdict | None:
    """Momentum that leaves more than nine tenths of the teacher's first weights, or a learning rate of 0."""
    if signs.peak_lr is not None and signs.peak_lr <= 0 and signs.done >= _FEWEST_STEPS:
        says = f"the learning rate has been 0 in all {signs.done:,} steps: neither student nor teacher moves"
        return _Verdict("frozen", problem("learning rate", says, "optim.base_lr=0.001, the preset's", lr=0.0))
    if max(signs.done, signs.total or 0) < _FEWEST_STEPS:
        return None
    at_end = _share_left(log, signs.done)
    if log.cfg is not None:
        at_end *= float(np.prod(_momentum(log.cfg)[signs.done :]))
    if not at_end > _MOST_LEFT:
        return None
    if at_end == 1.0:
        says = "the teacher never moves, because its momentum is 1 throughout: it stays what it was at the start"
    else:
        ended = signs.total is None or signs.done >= signs.total
        says = (
            f"the teacher hardly moves: its momentum is so near 1 that {at_end:.0%} of its first weights "
            f"{'are' if ended else 'will be'} left at the end"
        )
    says += f", and the teacher is what is evaluated and kept{_accuracies(log)}"
    facts = {"kept": at_end, "momentum": recent(log.series("mom"))}
    return _Verdict("frozen", problem("teacher", says, remedies.moving_teacher(signs), **facts))


def _share_left(log: RunLog, done: int) -> float:
    """Share of the teacher's first weights that `done` steps have left; NaN where neither log nor schedule tells."""
    momenta = log.series("mom")
    # A log whose beginning is missing shows the end of the schedule alone, where momentum is near 1 by design.
    if momenta and momenta[0][0] <= 0.1 * done:
        steps, values = zip(*momenta, strict=True)
        return float(np.prod(np.interp(np.arange(done), steps, values)))
    return float(np.prod(_momentum(log.cfg)[:done])) if log.cfg is not None else math.nan


def _momentum(cfg: Config) -> NDArray[np.float64]:
    teacher = cfg.teacher
    return CosineScheduler(teacher.momentum_teacher, teacher.final_momentum_teacher, total_steps(cfg)).schedule


def _collapsed(log: RunLog, signs: Signs) -> _Verdict | None:
    """The teacher is constant (entropy of its mean assignment, or the loss, below a tenth of ln K)."""
    if signs.ln_k is None:
        return None
    level, used = recent(signs.cross_entropy), recent(signs.marginal)
    # The loss alone is near 0 only for a constant teacher: different images cannot be told apart that surely.
    if not (used < 0.1 * signs.ln_k or (not signs.marginal and level < 0.05 * signs.ln_k)):
        return None
    n_used = f"{math.exp(used):.1f} of {math.exp(signs.ln_k):.0f} prototypes" if signs.marginal else "one prototype"
    says = (
        f"the teacher gives every image the same assignment (it uses {n_used}), so that the {signs.term} term "
        f"is at {level:.3f} without anything being learned"
    )
    return _Verdict(
        "collapsed", problem("teacher", says, remedies.more_prototypes(log, signs), level=level, marginal=used)
    )


def _same_features(log: RunLog, signs: Signs) -> _Verdict | None:
    """Class tokens of different images coincide: no spread, or most of them duplicates, or KoLeo beyond 8."""
    width, copies = recent(log.series("health_spread")), recent(log.series("health_duplicates"))
    rank, koleo = recent(log.series("health_rank")), recent(signs.koleo)
    if signs.done < _FEWEST_STEPS and not copies > 0.5:
        return None
    facts = {"spread": width, "duplicates": copies, "rank": rank, "koleo": koleo}
    infinite = any(not math.isfinite(value) for _, value in log.series("koleo_loss")[-3:])
    if infinite or koleo > 8 or copies > 0.5:
        says = (
            "class tokens of different images are duplicates of each other "
            f"(KoLeo term at {'infinity' if infinite else f'{koleo:.1f}'}, the logarithm of one over their distance)"
        )
        remedy = f"look for copies of one image in the data; if there are none, {remedies.smaller_steps(signs)}"
        return _Verdict("collapsed", problem("features", says, remedy, **facts))
    if width < 0.02 or (rank < 2 and width < 0.5 * first_value(log.series("health_spread"))):
        says = f"the features of all images are the same (spread {width:.3f} of 1, effective rank {rank:.1f})"
        return _Verdict("collapsed", problem("features", says, remedies.smaller_steps(signs), **facts))
    return None


def _uniform(log: RunLog, signs: Signs) -> _Verdict | None:
    """The teacher's mean entropy is within half a per cent of ln K; without health, the loss sits on ln K."""
    if signs.ln_k is None or signs.done < _judged_from(signs):
        return None
    level, unsure = recent(signs.cross_entropy), recent(signs.entropy)
    if unsure > 0.995 * signs.ln_k:
        says = (
            f"the teacher is sure of nothing: the entropy of its assignments is {unsure:.3f} where {signs.ln_k:.3f} "
            f"(ln K) is the uniform one, and the {signs.term} term is at {level:.3f}"
        )
    elif not signs.entropy and abs(level - signs.ln_k) < 0.002 * signs.ln_k:
        says = f"the {signs.term} term sits at {level:.3f}, which is ln K ({signs.ln_k:.3f}): that of a uniform teacher"
    else:
        return None
    temperature = recent(signs.teacher_temp)
    facts = {"level": level, "ln_k": signs.ln_k, "entropy": unsure, "teacher_temp": temperature}
    if temperature >= _STUDENT_TEMP:
        remedy = (
            f"the teacher's temperature is {temperature:g}, not below the student's {_STUDENT_TEMP}: "
            "teacher.teacher_temp=0.04 teacher.warmup_teacher_temp=0.02"
        )
    elif signs.peak_lr is not None and signs.peak_lr > HIGH_LR:
        remedy = remedies.smaller_steps(signs)
    else:
        remedy = f"halve teacher.teacher_temp and teacher.warmup_teacher_temp (now {temperature:.2g})"
    return _Verdict("uniform", problem("teacher", says, remedy, **facts))


def _trivial(log: RunLog, signs: Signs) -> _Verdict | None:
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
        return _Verdict("trivial", problem("task", says, "dino.loss_weight=1.0", **facts))
    if dino and not _masks(cfg) and _whole_images(cfg) and not _colors_change(cfg):
        says = (
            "student and teacher see the same pixels: all crops are (nearly) whole images, no colour is changed and "
            f"no patch masked, so that recognising pixels is enough{_accuracies(log)}"
        )
        return _Verdict("trivial", problem("task", says, remedies.harder_task(cfg), **facts))
    return None


def _data_bound(log: RunLog, signs: Signs) -> _Verdict | None:
    """More than 40 % of the time is spent waiting for data."""
    share = recent(signs.waiting)
    if not share > 0.4:
        return None
    says = f"{share:.0%} of the time is spent waiting for data; the model computes in the rest"
    return _Verdict("data_bound", problem("data", says, remedies.faster_data(log), share=share))


def _no_transfer(log: RunLog, signs: Signs) -> _Verdict | None:
    """The loss is below its first value, and no accuracy has come to more than without training, or rises.

    Only from half of the run on: accuracy may dip at a start. An accuracy that does not rise is no sign where the
    training began from weights; one that falls by two points is.
    """
    first, now = first_value(signs.cross_entropy), recent(signs.cross_entropy)
    curves = {name: curve for name, series in log.accuracies.items() if (curve := finite(series))}
    if _is_young(signs) or not now < first or not curves:
        return None
    faults = [_fault_of_accuracy(log, signs, name, curve) for name, curve in curves.items()]
    if not all(faults):  # one that rises is enough
        return None
    says = f"the {signs.term} term fell from {first:.2f} to {now:.2f}, but {'; '.join(faults)}"
    facts = {name: [value for _, value in curve] for name, curve in curves.items()}
    return _Verdict("no_transfer", problem("accuracy", says, remedies.harder_task(log.cfg), **facts))


def _fault_of_accuracy(log: RunLog, signs: Signs, name: str, curve: MetricSeries) -> str:
    """Sign in a curve of accuracy that training was of no use, in a few words; "" for none."""
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


def _learning(log: RunLog, signs: Signs) -> _Verdict:
    """Learns when the student knows clearly more than nothing, or an accuracy rises; stalls when it had time to."""
    if not signs.known and signs.done >= _FEWEST_STEPS:
        if not signs.cross_entropy:
            remedy = "look at training_metrics.json: is it whole?"
            return _Verdict("unknown", note("learning", "the log holds no DINO or iBOT term", remedy))
        says = "neither the number of prototypes nor health is there, so the losses do not say what the student knows"
        return _Verdict("unknown", note("learning", says, "put the run's readable config.yaml beside its log"))
    needed = _judged_from(signs)
    if len(signs.cross_entropy) < _FEWEST_ROWS or signs.done < needed:
        over = signs.total is not None and signs.done >= signs.total
        longer = f"a longer run, of {needed:,} steps at least (optim.epochs)"
        says = f"{signs.done:,} steps are too few to judge learning"
        remedy = longer if over else f"ask again after step {needed:,}"
        return _Verdict("too early", note("learning", says, remedy, done=signs.done))
    known, message, halves = recent(signs.known), recent(signs.message), trend(signs.known, start=signs.warmup)
    curves = {name: series for name, series in log.accuracies.items() if len(series) > 1}
    gains = {name: series[-1][1] - series[0][1] for name, series in curves.items()}
    shown = "; ".join(f"{name} {series[0][1]:.1f} -> {series[-1][1]:.1f} %" for name, series in curves.items())
    words = f"the student knows {known:.3f} nats about an image's prototype beyond guessing"
    if math.isfinite(message):
        words += f", of {message:.3f} that the teacher tells"
    enough = signs.ln_k is not None and known > _ENOUGH * signs.ln_k
    rising, falling = (halves is not None and halves.rises), (halves is not None and halves.falls)
    facts = {"known": known, "message": message, "gains": gains}
    ending = f"; {shown}" if shown else ""
    if enough and not falling:
        says = f"{words}{', and it still grows' if rising else ''}{ending}"
        return _Verdict("learns", fine("learning", says, **facts))
    if any(gain > _GAIN for gain in gains.values()):
        return _Verdict("learns", fine("learning", f"{words}, but accuracy rises: {shown}", **facts))
    if enough:
        says = f"{words}, and it is losing that again{ending}"
        return _Verdict("stalled", problem("learning", says, remedies.smaller_steps(signs), **facts))
    if _is_young(signs) and (rising or halves is None):
        says = f"{words}, which {'grows' if rising else 'may still grow'}"
        return _Verdict("too early", note("learning", says, "ask again later", **facts))
    says = f"{words}: next to nothing{ending}"
    return _Verdict("stalled", problem("learning", says, remedies.faster_learning(signs), **facts))


_RULES: tuple[Callable[[RunLog, Signs], _Verdict | None], ...] = (
    _not_finite,
    _large_steps,
    _frozen,
    _collapsed,
    _same_features,
    _uniform,
    _trivial,
    _data_bound,
    _no_transfer,
    _learning,
)


def _remarks(log: RunLog, signs: Signs, *, broken: bool) -> Iterator[Finding]:
    """Findings that do not decide, but may explain; of a broken run only what may have broken it."""
    if signs.peak_lr is not None and signs.peak_lr > HIGH_LR and not broken:
        yield problem("learning rate", f"the learning rate goes up to {signs.peak_lr:g}", remedies.smaller_steps(signs))
    rates = [(i, value) for i, value in log.series("lr") if i >= signs.warmup and value > 0]
    if jumps := [i for (_, before), (i, after) in pairwise(rates) if after > 3 * before]:
        says = f"the learning rate jumps to more than three times its value at step {jumps[0]:,}"
        yield note("learning rate", says, "was the run resumed with another schedule?", steps=jumps[:10])
    for part, norms in _gradients(log):
        first = first_value([(i, value) for i, value in norms if i >= signs.warmup and value > 0])
        if recent(norms) > 100 * first:
            says = f"gradients of the {part} have grown from {first:.2g} to {recent(norms):.2g}"
            yield note("gradients", says, remedies.smaller_steps(signs))
    if log.skipped:
        says = f"{len(log.skipped)} steps were skipped because their loss or gradient was not finite"
        yield note("skipped steps", says, "see skipped_steps.json for their images", count=len(log.skipped))
    if log.unreadable:
        says = f"{log.unreadable} images could not be read"
        yield note("images", says, "see unreadable_images.json", count=log.unreadable)
    share = recent(signs.waiting)
    waiting = f"{share:.0%} of the time is spent waiting for data"
    if 0.2 < share <= 0.4:
        yield note("data", waiting, remedies.faster_data(log), share=share)
    elif share <= 0.2:
        yield fine("data", waiting, share=share)
    if broken:
        for name, series in log.accuracies.items():
            if series and series[-1][1] > series[0][1] + _LOSS:
                says = f"{name} rises all the same, from {series[0][1]:.1f} to {series[-1][1]:.1f} %"
                remedy = "other terms of the loss, such as KoLeo, still train the features; it could be more"
                yield note("accuracy", says, remedy)
        return
    rank, bound = recent(log.series("health_rank")), recent(log.series("health_rank_bound"))
    if math.isfinite(rank):
        yield fine("features", f"class tokens use {rank:.0f} of at most {bound:.0f} directions", rank=rank, bound=bound)
    high = recent(log.series("health_high_norm_share"))
    if high > 0.02 and log.cfg is not None and not log.cfg.student.num_register_tokens:
        norms_above = f"norms above {HIGH_NORM_FACTOR:g} medians"
        says = f"{high:.1%} of the patches have {norms_above}, which may disturb dense features"
        yield note("patches", says, "student.num_register_tokens=4 in a new run", share=high)


def _task_remarks(log: RunLog, signs: Signs) -> Iterator[Finding]:
    """Settings that make the task easier than it need be, and accuracies below that of raw pixels."""
    cfg = log.cfg
    if cfg is not None and cfg.ibot.loss_weight > 0 and not _masks(cfg):
        says = "ibot.loss_weight is above 0, but no patch is ever masked, so that there is nothing to predict"
        yield note("patches", says, "ibot.mask_sample_probability=0.5 'ibot.mask_ratio_min_max=[0.1,0.5]'")
    if cfg is not None and cfg.dino.loss_weight > 0 and _whole_images(cfg) == _colors_change(cfg):
        if _whole_images(cfg):
            says = "all crops are (nearly) whole images and differ in colour alone, which teaches little about shapes"
        else:
            says = "crops differ in place and size alone: their colours give away which image they are from"
        yield note("views", says, remedies.harder_task(cfg))
    pixels = log.baselines.get("raw_pixels", math.nan)
    for name, series in log.accuracies.items():
        curve = finite(series)
        done = signs.total is not None and signs.done >= signs.total
        if name.startswith("k-NN") and done and curve and curve[-1][1] < pixels:
            says = f"{name} is {curve[-1][1]:.1f} % at the end, less than the {pixels:.1f} % of raw pixels"
            yield note("accuracy", says, "a longer run (optim.epochs)", accuracy=curve[-1][1], raw_pixels=pixels)


def _judged_from(signs: Signs) -> int:
    """Steps after which learning can be judged: the last quarter of the log lies behind the warm-up then."""
    return max(_FEWEST_STEPS, math.ceil(signs.warmup * 4 / 3))


def _is_young(signs: Signs) -> bool:
    return signs.total is not None and signs.done < 0.5 * signs.total


def _gradients(log: RunLog) -> list[tuple[str, MetricSeries]]:
    """Gradient norms by the part of the model that they belong to."""
    keys = sorted({key for row in log.rows for key in row if key.startswith("grad_norm_")})
    return [(key.removeprefix("grad_norm_").replace("_", " "), log.series(key)) for key in keys]


def _accuracies(log: RunLog) -> str:
    """`; k-NN top-1 20.4 -> 20.4 %` for what was evaluated twice or more."""
    curves = {name: curve for name, series in log.accuracies.items() if len(curve := finite(series)) > 1}
    return "".join(f"; {name} {curve[0][1]:.1f} -> {curve[-1][1]:.1f} %" for name, curve in curves.items())


def _masks(cfg: Config) -> bool:
    """Whether patches of the student's global crops are masked."""
    return cfg.ibot.mask_sample_probability > 0 and cfg.ibot.mask_ratio_min_max[1] > 0


def _whole_images(cfg: Config) -> bool:
    crops = cfg.crops
    local = crops.local_crops_number == 0 or crops.local_crops_scale[0] >= _WHOLE
    return crops.global_crops_scale[0] >= _WHOLE and local


def _colors_change(cfg: Config) -> bool:
    """Whether anything but place, size and side of a crop differs between views."""
    crops = cfg.crops
    jitter = crops.color_jitter_p > 0 and crops.color_jitter_strength > 0
    return jitter or crops.grayscale_p > 0 or crops.solarize_p > 0 or max(crops.blur_p[:2]) > 0
