"""What the signs of a run mean, in words, and what to try.

Each rule looks at one thing and returns a finding or None. A rule that decides names a verdict; the first one in the
order of `VERDICTS` is the run's. The thresholds are stated beside the rules, in the unit of what they judge; they hold
for values of the last quarter of the log, so that the noise of a start does not count.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from dinov2.analysis.patch_maps import HIGH_NORM_FACTOR
from dinov2.apps.doctor.findings import Finding, fine, note, problem
from dinov2.apps.doctor.remedies import HIGH_LR, calmer, feeding, livelier, spread_out
from dinov2.apps.doctor.run_log import RunLog
from dinov2.apps.doctor.signs import Signs, first_of, recent, trend, wavering
from dinov2.apps.doctor.verdicts import VERDICTS, Judged

__all__ = ["examine_learning"]

_FEWEST_ROWS = 8
_FEWEST_STEPS = 100

# The student's temperature; a teacher that is not sharper than the student teaches nothing.
_STUDENT_TEMP = 0.1

# What a student that learns knows at least beyond guessing, in parts of ln K: more than the noise of single steps.
_ENOUGH = 0.005

_Rule = Callable[[RunLog, Signs], Judged | None]


def examine_learning(log: RunLog, signs: Signs) -> tuple[str, list[Finding]]:
    """The verdict, and all findings about learning: what decides first, then what is worth knowing."""
    judged = [found for rule in _DECIDING if (found := rule(log, signs)) is not None]
    order = list(VERDICTS)
    judged.sort(key=lambda found: order.index(found.verdict))
    verdict = judged[0].verdict if judged else "too early"
    # A student cannot learn from a broken teacher: that it does not is no finding of its own.
    broken = verdict in ("diverged", "collapsed", "uniform")
    kept = [found.finding for found in judged if not (broken and found.verdict in ("stalled", "learns", "too early"))]
    return verdict, [*kept, *_remarks(log, signs, broken=broken)]


def _diverged(log: RunLog, signs: Signs) -> Judged | None:
    """Values that are not finite at the end of the log: null in a row, or as many skipped steps as end a run."""
    last = log.rows[-max(3, len(log.rows) // 4) :]
    broken = [row for row in last if any(row.get(key, 0.0) is None for key in ("total_loss", "loss"))]
    skipped = [step for step in log.skipped if log.rows and step >= int(last[0]["iteration"])]
    limit = log.cfg.train.max_skipped_steps if log.cfg is not None else 5
    if not broken and len(skipped) < limit:
        return None
    says = f"the loss or its gradients are not finite in {max(len(skipped), len(broken))} of the last steps"
    return Judged("diverged", problem("loss", says, calmer(signs), skipped=len(log.skipped)))


def _broken(log: RunLog, signs: Signs) -> Judged | None:
    """The student knows nothing behind the warm-up, and two traces or more say that large steps broke the network."""
    if signs.ln_k is None or not signs.known or signs.done < _ripe(signs):
        return None
    known, traces = recent(signs.known), list(_traces_of_large_steps(log, signs))
    # A teacher that says nothing lets ranks shrink and gradients die too: then it takes a third trace.
    nearer = (_collapsed, _same_features, _uniform) if signs.entropy else (_collapsed, _same_features)
    silent = any(rule(log, signs) is not None for rule in nearer)
    if known > _ENOUGH * signs.ln_k or len(traces) < 2 + silent:
        return None
    known_words = f"the student knows {known:.3f} nats beyond guessing"
    says = f"large steps have broken the network: {known_words}, and {'; '.join(traces)}"
    return Judged("diverged", problem("loss", says, calmer(signs), known=known, traces=traces))


def _traces_of_large_steps(log: RunLog, signs: Signs) -> Iterator[str]:
    """What large steps leave behind, each in a few words; any one of them may have another reason."""
    level = recent(signs.cross_entropy)
    lowest = min((value for _, value in signs.cross_entropy if math.isfinite(value)), default=math.nan)
    if signs.ln_k is not None and level > lowest + 0.05 * signs.ln_k:
        yield f"the {signs.term} term is at {level:.2f} and has been at {lowest:.2f}"
    if signs.peak_lr is not None and signs.peak_lr > HIGH_LR:
        yield f"the learning rate went up to {signs.peak_lr:g}"
    ranks = log.series("health_rank")
    if recent(ranks) < 0.5 * first_of(ranks):
        yield f"the features have shrunk from {first_of(ranks):.0f} directions to {recent(ranks):.0f}"
    tossing = wavering(log.series("health_spread"))
    if tossing > 0.05:
        yield f"the features are thrown about (their spread changes to and fro by {tossing:.2f} from row to row)"
    for key in _gradient_keys(log):
        norms = [(i, value) for i, value in log.series(key) if value > 0]
        early = recent(norms[: max(3, len(norms) // 4)])
        if recent(norms) < 0.01 * early:
            yield f"gradients of the {_part(key)} have died ({early:.2g} -> {recent(norms):.2g})"
    for name, series in log.accuracies.items():
        if series and series[-1][1] < series[0][1] - 2.0:
            yield f"{name} fell from {series[0][1]:.1f} to {series[-1][1]:.1f} %"


def _collapsed(log: RunLog, signs: Signs) -> Judged | None:
    """The teacher is constant (entropy of its mean assignment, or the loss, below a tenth of ln K)."""
    if signs.ln_k is None:
        return None
    level, used = recent(signs.cross_entropy), recent(signs.marginal)
    # The loss alone is near 0 only for a constant teacher: different images cannot be told apart that surely.
    if used < 0.1 * signs.ln_k or (not signs.marginal and level < 0.05 * signs.ln_k):
        prototypes = (
            f"{math.exp(used):.1f} of {math.exp(signs.ln_k):.0f} prototypes" if signs.marginal else "one prototype"
        )
        says = (
            f"the teacher gives every image the same assignment (it uses {prototypes}), so that the {signs.term} term "
            f"is at {level:.3f} without anything being learned"
        )
        return Judged("collapsed", problem("teacher", says, spread_out(log, signs), level=level, marginal=used))
    return None


def _same_features(log: RunLog, signs: Signs) -> Judged | None:
    """Class tokens of different images coincide: no spread, or most of them duplicates, or KoLeo beyond 8."""
    width, copies = recent(log.series("health_spread")), recent(log.series("health_duplicates"))
    rank, koleo = recent(log.series("health_rank")), recent(signs.koleo)
    if signs.done < _FEWEST_STEPS and not copies > 0.5:
        return None
    facts = {"spread": width, "duplicates": copies, "rank": rank, "koleo": koleo}
    infinite = [value for _, value in log.series("koleo_loss")[-3:] if not math.isfinite(value)]
    if infinite or koleo > 8 or copies > 0.5:
        says = (
            "class tokens of different images are duplicates of each other "
            f"(KoLeo term at {'infinity' if infinite else f'{koleo:.1f}'}, the logarithm of one over their distance)"
        )
        remedy = f"look for copies of one image in the data; if there are none, {calmer(signs)}"
        return Judged("collapsed", problem("features", says, remedy, **facts))
    start = first_of(log.series("health_spread"))
    if width < 0.02 or (rank < 2 and width < 0.5 * start):
        says = f"the features of all images are the same (spread {width:.3f} of 1, effective rank {rank:.1f})"
        return Judged("collapsed", problem("features", says, calmer(signs), **facts))
    return None


def _uniform(log: RunLog, signs: Signs) -> Judged | None:
    """The teacher's mean entropy is within half a per cent of ln K; without health, the loss sits on ln K."""
    if signs.ln_k is None or signs.done < _ripe(signs):
        return None
    level, unsure = recent(signs.cross_entropy), recent(signs.entropy)
    temperature = recent(signs.teacher_temp)
    facts = {"level": level, "ln_k": signs.ln_k, "entropy": unsure, "teacher_temp": temperature}
    if unsure > 0.995 * signs.ln_k:
        says = (
            f"the teacher is sure of nothing: the entropy of its assignments is {unsure:.3f} where {signs.ln_k:.3f} "
            f"(ln K) is the uniform one, and the {signs.term} term is at {level:.3f}"
        )
    elif not signs.entropy and abs(level - signs.ln_k) < 0.002 * signs.ln_k:
        says = f"the {signs.term} term sits at {level:.3f}, which is ln K ({signs.ln_k:.3f}): that of a uniform teacher"
    else:
        return None
    if temperature >= _STUDENT_TEMP:
        remedy = (
            f"the teacher's temperature is {temperature:g}, not below the student's {_STUDENT_TEMP}: "
            "teacher.teacher_temp=0.04 teacher.warmup_teacher_temp=0.02"
        )
    elif signs.peak_lr is not None and signs.peak_lr > HIGH_LR:
        remedy = calmer(signs)
    else:
        remedy = f"halve teacher.teacher_temp and teacher.warmup_teacher_temp (now {temperature:.2g})"
    return Judged("uniform", problem("teacher", says, remedy, **facts))


def _starved(log: RunLog, signs: Signs) -> Judged | None:
    """More than 40 % of the time is spent waiting for data."""
    share = recent(signs.waiting)
    if not share > 0.4:
        return None
    says = f"{share:.0%} of the time is spent waiting for data; the model computes in the rest"
    return Judged("starved", problem("data", says, feeding(log), share=share))


def _knowing(log: RunLog, signs: Signs) -> Judged | None:
    """Learns when the student knows clearly more than nothing, or an accuracy rises; stalls when it had time to."""
    needed = _ripe(signs)
    if len(signs.cross_entropy) < _FEWEST_ROWS or signs.done < needed:
        says = f"{signs.done:,} steps are too few to judge learning"
        over = signs.total is not None and signs.done >= signs.total
        remedy = (
            f"a longer run, of {needed:,} steps at least (optim.epochs)" if over else f"ask again after step {needed:,}"
        )
        return Judged("too early", note("learning", says, remedy, done=signs.done))
    if not signs.known:
        return None
    known, told = recent(signs.known), recent(signs.message)
    halves = trend(signs.known, start=signs.warmup)
    gains = {name: series[-1][1] - series[0][1] for name, series in log.accuracies.items() if len(series) > 1}
    facts = {"known": known, "message": told, "gains": gains}
    words = f"the student knows {known:.3f} nats about an image's prototype beyond guessing"
    if math.isfinite(told):
        words += f", of {told:.3f} that the teacher tells"
    enough = signs.ln_k is not None and known > _ENOUGH * signs.ln_k
    rising = halves is not None and halves.rises
    better = [name for name, gain in gains.items() if gain > 1.0]
    shown = "; ".join(
        f"{name} {log.accuracies[name][0][1]:.1f} -> {log.accuracies[name][-1][1]:.1f} %" for name in gains
    )
    if enough and not (halves is not None and halves.falls):
        more = ", and it still grows" if rising else ""
        return Judged(
            "learns", Finding("fine", "learning", f"{words}{more}{f'; {shown}' if shown else ''}", facts=facts)
        )
    if better:
        return Judged("learns", Finding("fine", "learning", f"{words}, but accuracy rises: {shown}", facts=facts))
    if enough:
        says = f"{words}, and it is losing that again{f'; {shown}' if shown else ''}"
        return Judged("stalled", Finding("problem", "learning", says, calmer(signs), facts))
    young = signs.total is not None and signs.done < 0.5 * signs.total
    if young and (rising or halves is None):
        says = f"{words}, which {'grows' if rising else 'may still grow'}"
        return Judged("too early", Finding("note", "learning", says, "ask again later", facts))
    says = f"{words}: next to nothing{f'; {shown}' if shown else ''}"
    return Judged("stalled", Finding("problem", "learning", says, livelier(log, signs), facts))


_DECIDING: tuple[_Rule, ...] = (_diverged, _broken, _collapsed, _same_features, _uniform, _starved, _knowing)


def _remarks(log: RunLog, signs: Signs, *, broken: bool) -> Iterator[Finding]:
    """What does not decide, but may explain; of a broken run only what may have broken it."""
    if signs.peak_lr is not None and signs.peak_lr > HIGH_LR and not broken:
        yield problem("learning rate", f"the learning rate goes up to {signs.peak_lr:g}", calmer(signs))
    yield from _spikes(log, signs)
    if log.skipped:
        says = f"{len(log.skipped)} steps were skipped because their loss or gradient was not finite"
        yield note("skipped steps", says, "see skipped_steps.json for their images", count=len(log.skipped))
    if log.unreadable:
        says = f"{log.unreadable} images could not be read"
        yield note("images", says, "see unreadable_images.json", count=log.unreadable)
    share = recent(signs.waiting)
    if 0.2 < share <= 0.4:
        yield note("data", f"{share:.0%} of the time is spent waiting for data", feeding(log), share=share)
    elif share <= 0.2:
        yield fine("data", f"{share:.0%} of the time is spent waiting for data", share=share)
    if broken:
        for name, series in log.accuracies.items():
            if series and series[-1][1] > series[0][1] + 2.0:
                says = f"{name} rises all the same, from {series[0][1]:.1f} to {series[-1][1]:.1f} %"
                remedy = "other terms of the loss, such as KoLeo, still train the features; it could be more"
                yield note("accuracy", says, remedy)
        return
    rank, bound = recent(log.series("health_rank")), recent(log.series("health_rank_bound"))
    if math.isfinite(rank):
        yield fine("features", f"class tokens use {rank:.0f} of at most {bound:.0f} directions", rank=rank, bound=bound)
    high = recent(log.series("health_high_norm_share"))
    if high > 0.02 and log.cfg is not None and not log.cfg.student.num_register_tokens:
        says = (
            f"{high:.1%} of the patches have norms above {HIGH_NORM_FACTOR:g} medians, which may disturb dense features"
        )
        yield note("patches", says, "student.num_register_tokens=4 in a new run", share=high)


def _spikes(log: RunLog, signs: Signs) -> Iterator[Finding]:
    """Jumps of the learning rate behind the warm-up, and gradients that grew a hundredfold."""
    rates = [(i, value) for i, value in log.series("lr") if i >= signs.warmup and value > 0]
    jumps = [i for (_, before), (i, after) in pairwise(rates) if after > 3 * before]
    if jumps:
        says = f"the learning rate jumps to more than three times its value at step {jumps[0]:,}"
        yield note("learning rate", says, "was the run resumed with another schedule?", steps=jumps[:10])
    for key in _gradient_keys(log):
        norms = log.series(key)
        first = first_of([(i, value) for i, value in norms if i >= signs.warmup and value > 0])
        if recent(norms) > 100 * first:
            says = f"gradients of the {_part(key)} have grown from {first:.2g} to {recent(norms):.2g}"
            yield note("gradients", says, calmer(signs))


def _ripe(signs: Signs) -> int:
    """Steps after which learning can be judged: the last quarter of the log lies behind the warm-up then."""
    return max(_FEWEST_STEPS, math.ceil(signs.warmup * 4 / 3))


def _gradient_keys(log: RunLog) -> list[str]:
    return sorted({key for row in log.rows for key in row if key.startswith("grad_norm_")})


def _part(key: str) -> str:
    return key.removeprefix("grad_norm_").replace("_", " ")
